"""Files of texts, whatever their format -> documents.

A file is divided into parts of bounded size that can be read in any order and by any process: a range of bytes, of rows
or of tokens. A part is read as pieces of documents, so that no document must fit in memory, unless it is one row.
"""

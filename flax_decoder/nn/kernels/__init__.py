"""Other ways to the numbers of `attention.dot_product_attention`; one signature for all."""

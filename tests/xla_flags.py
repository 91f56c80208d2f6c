"""How XLA compiles where tests run: a tiny program need not become a fast one, and most of a test's work is compiling.

Without the emitters of fusions, which go through MLIR, the programs of a small run take 40 % less work to compile; one
part for LLVM in place of many takes a little less again. XLA stops with the name of a flag that it does not know, and
jaxlib 0.11.1 no longer knows the first.
"""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):
    QUICK += " --xla_cpu_use_fusion_emitters=false"

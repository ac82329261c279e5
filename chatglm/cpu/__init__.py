"""The engine: what the model computes on a CPU, faster, by kernels that are compiled when needed.

Owns the functions that the model's files ask for through `environment_chatglm`, each the twin of
one of theirs: it takes the same arguments and returns the same, or None for operands that it leaves
to plain torch. `SEAM_VERSION` counts the changes of what they take.

    writer, compiler, kernel_cache, runtime     LLVM code: written, compiled, kept, run on threads
    rounding, dots                              rounded inputs, bytes that are multiplied
    packed_products, packed_tiles               kernels of products that round their input
    float_products, tile_products, amx          those that do not; tile registers
    attention, elementwise, step_graph          the other kernels, and a whole step as one call
    prompt_kernels, prompt_tiles                the attention of many tokens
    prompt_attention                            which of the attentions, on which columns of a row
    products                                    what every product is chosen by
    float_linear, linear, decoding_step, memory which of them computes what
"""

from chatglm.cpu.decoding_step import decode_step
from chatglm.cpu.linear import fast_products, find_kernels
from chatglm.cpu.memory import map_in_parts
from chatglm.cpu.prompt_attention import attend

SEAM_VERSION = 1

__all__ = [
    "SEAM_VERSION",
    "attend",
    "decode_step",
    "fast_products",
    "find_kernels",
    "map_in_parts",
]

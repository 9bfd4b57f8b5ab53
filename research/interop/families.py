"""The one table of families that are imported and exported. A new one is its file and a row here."""

from research.interop.family import Family
from research.interop.gpt2 import GPT2
from research.interop.jamba import JAMBA
from research.interop.llama import LLAMA, MIXTRAL, QWEN3
from research.interop.mamba import MAMBA, MAMBA2, RWKV

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, GPT2, QWEN3, MIXTRAL, MAMBA, MAMBA2, JAMBA, RWKV)}

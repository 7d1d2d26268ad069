"""Things with weights: SAM at any size, its prompt-free decoder, low-rank adaptation, adapters on disk."""

from blosam_monai.networks.adapters import load_network, read_settings, save_adapters
from blosam_monai.networks.lora import LoRALinear, add_lora
from blosam_monai.networks.prompt_decoder import PromptDecoder
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.networks.sam import build_sam

__all__ = [
    "LoRALinear",
    "PromptDecoder",
    "PromptSam",
    "add_lora",
    "build_sam",
    "load_network",
    "read_settings",
    "save_adapters",
]

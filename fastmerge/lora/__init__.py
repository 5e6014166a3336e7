"""LoRA adapters as tools use them: fused into a base, combined with one another, and extracted from a fine-tune.

    from fastmerge import lora
    lora.fuse("base", "adapter", "out")
    lora.combine(["one", "two"], "both", method="ties", density=0.5)
    lora.extract("base", "tuned", "adapter", rank=16)

The adapters that come out are plain LoRA as PEFT saves it: adapter_config.json beside adapter_model.safetensors.
"""

from .combining import combine
from .extracting import extract
from .fusing import fuse
from .output import AdapterReport, Fitted

__all__ = ["AdapterReport", "Fitted", "combine", "extract", "fuse"]

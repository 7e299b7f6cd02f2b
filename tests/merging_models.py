"""Small Llama checkpoints and adapters for the merging tests."""

from __future__ import annotations

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from expunge.merging.ties import ties


def llama(seed: int = 0, *, tied: bool = False, **changes) -> LlamaForCausalLM:
    """Two layers, hidden size 32: every tensor has an even number of elements."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers: matrices stored (in, out), some of them square; tied embeddings."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def moved(base: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """A specialist: the base with noise on every parameter."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def save(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype | None = None, **options) -> Path:
    """The model as a folder, in another dtype if wanted."""
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **options)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, sharded or not."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, change) -> Path:
    """Apply `change(tensors)` to a single-file checkpoint or adapter in place."""
    file = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def reconfigure(file: Path, **changes) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def adapter(
    base: LlamaForCausalLM | torch.nn.Module, folder: Path, seed: int, base_name: str | None = None, **settings
) -> Path:
    """A LoRA adapter with all that it trains at random, saved by PEFT; the base model object is used up."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base, LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
            elif parameter.requires_grad:  # magnitudes, biases, whole modules and tokens start where the base is
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(folder)
    return folder


def folded(base_folder: Path, adapter_folder: Path, folder: Path) -> Path:
    """What PEFT makes of base and adapter, as a checkpoint."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload().save_pretrained(folder)
    return folder


@cache
def _three() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as work:
        folder, base = Path(work), llama(0)
        for model, name in zip([base, moved(base, 1), moved(base, 2)], ["base", "a", "b"], strict=True):
            save(model, folder / name)
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_three(folder: Path) -> Path:
    """A base and two specialists, float32, in single files: `base`, `a` and `b` in `folder`."""
    for name, content in _three().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def in_memory(folder, density, scale=1.0, dtype=torch.float32, **parameters):
    """TIES tensor by tensor on whole state dicts."""
    base, one, two = (weights(folder / name) for name in ("base", "a", "b"))
    merged = {}
    for name, tensor in base.items():
        deltas = [model[name].float() - tensor.float() for model in (one, two)]
        merged[name] = (tensor.float() + scale * ties(deltas, [1.0, 0.5], [density] * 2, **parameters)).to(dtype)
    return merged


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )

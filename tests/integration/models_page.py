"""Writes the tables of docs/reference/models.md from the model matrix: `python tests/integration/models_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from matrix import (
    BIDIRECTIONAL_IMAGES,
    CACHES,
    GENERATION,
    IGNORES_PACKING,
    MATRIX,
    ON_CUDA_ONLY,
    TENSOR_PARALLEL,
)

import patchattn
from patchattn.hf.support import attention_modules
from patchattn.testing import tiny_model
from patchattn.testing.models import HYBRID_FAMILIES, REFUSED_FAMILIES, VISION_FAMILIES

PAGE = Path(__file__).parents[2] / "docs/reference/models.md"
BEGIN = "<!-- Written by tests/integration/models_page.py: change the tests, not the tables. -->"
END = "<!-- End of the written part. -->"


def written_part() -> str:
    """Return what the page says between its two markers."""
    return "\n\n".join((supported_table(), features(), other_table(), refused_table()))


def supported_table() -> str:
    rows = [
        "| family | class | layers that are patched | what is special | quantised cache | packed sequences |",
        "|---|---|---|---|---|---|",
    ]
    for family in MATRIX:
        model = tiny_model(family)
        support = patchattn.check_support(model)
        assert support, family
        cells = (
            f"`{family}`",
            f"`{type(model).__name__}`",
            "full ones, not sliding ones" if support.local_layers else "all",
            ", ".join(special(family, model)),
            "transformers has none for sliding layers" if support.local_layers else "yes",
            "transformers lets them see each other" if family in IGNORES_PACKING else "kept apart, dense",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def special(family: str, model: object) -> list[str]:
    """Name what the family's attention has beyond Llama's, as read from the model."""
    config = model.config.get_text_config(decoder=True)
    modules = list(attention_modules(model).values())
    module = modules[0]
    found = {
        "text tower of a vision-language model": family in VISION_FAMILIES,
        "softcap": getattr(module, "attn_logit_softcapping", None) is not None,
        "layers that share keys": any(getattr(m, "is_kv_shared_layer", False) for m in modules),
        "learned sink logits": hasattr(module, "sinks"),
        "latent keys and values of different sizes (MLA)": hasattr(module, "kv_lora_rank"),
        "normalised queries and keys": hasattr(module, "q_norm"),
        "layers without rotary embedding": 0 in (getattr(config, "no_rope_layers", None) or ()),
        "own scale of the scores": hasattr(config, "attention_multiplier"),
        "mixture of experts": any(type(part).__name__.endswith("Experts") for part in model.modules()),
        "positions in three dimensions": "mrope_section" in (getattr(config, "rope_parameters", None) or {}),
        "image tokens see each other, so a prompt with images attends densely": family in BIDIRECTIONAL_IMAGES,
    }
    return [name for name, holds in found.items() if holds]


def features() -> str:
    calls = [
        "forward in float32 and bfloat16, with padding, with `inputs_embeds` and with `use_cache=False`",
        f"`generate`: {', '.join(GENERATION)}",
        f"caches: dynamic, {', '.join(CACHES)}; {' and '.join(ON_CUDA_ONLY)} in tests that need a CUDA device",
        "packed sequences by `position_ids`, and 4-D masks: these attend densely, counted under `mask`",
    ]
    return "\n".join(
        [
            "Each family above is run, as a tiny random model of its real class, through:",
            "",
            *(f"- {call}" for call in calls),
            "",
            f"Tensor parallel on two processes: {', '.join(f'`{family}`' for family in TENSOR_PARALLEL)}.",
        ]
    )


OTHERS = {
    "`Gemma4ForConditionalGeneration`": "vision and audio towers stay as they are; layers that share keys share "
    "moments, and may be given the last queries of a prompt only",
    "`GlmOcrForConditionalGeneration`": "reads text in pictures; its vision tower stays as it is",
    "`VoxtralForConditionalGeneration`": "listens; its audio tower stays as it is",
    "weights in buffers": "as GPTQ, AWQ and EETQ hold them",
    "`torch.ao.quantization.quantize_dynamic`": "weights that are neither parameters nor buffers",
    "bitsandbytes": "4 and 8 bits",
    "torchao": "weights in int8, int4 and float8",
    "hqq": "4 and 8 bits",
}
"""What test_towers.py and test_quantised.py run, with what is special; quantised models are Llamas."""


def other_table() -> str:
    rows = [
        "These are run too, through forward and `generate`:",
        "",
        "| model or weights | layers that are patched | what is special |",
        "|---|---|---|",
    ]
    for family in HYBRID_FAMILIES:
        model = tiny_model(family)
        assert patchattn.check_support(model), family
        kept = "layers of linear attention, and a cache of its own"
        rows.append(f"| `{type(model).__name__}` | those of softmax attention | {kept} |")
    rows += [f"| {name} | full ones, not sliding ones | {what} |" for name, what in OTHERS.items()]
    return "\n".join(rows)


def refused_table() -> str:
    rows = ["| refused family | class | reason that `check_support` gives |", "|---|---|---|"]
    for family in REFUSED_FAMILIES:
        model = tiny_model(family)
        support = patchattn.check_support(model)
        assert not support, family
        rows.append(f"| `{family}` | `{type(model).__name__}` | {' '.join(str(support).splitlines())} |")
    return "\n".join(rows)


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{written_part()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The allow-list: what runs, and the reason given for what doesn't."""

from __future__ import annotations

import pytest

from worker.engine.architectures import SUPPORTED, UnsupportedModelError, check_supported


def config(name: str = "LlamaForCausalLM", **more):
    return {"architectures": [name], "model_type": SUPPORTED.get(name, "other"), **more}


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_supported(name):
    assert check_supported(config(name)) == name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": [3]}, "names no architecture"),
        (config("Gemma2ForCausalLM"), "soft-cap"),
        (config("GptOssForCausalLM"), "sinks"),
        (config("Gemma3ForConditionalGeneration"), "text-only"),
        (config("NobodysModel"), "isn't on the list"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "weird"}, "not supported"),
        (config(quantization_config={"bits": 4}), "quantized"),
        (config("Gemma3ForCausalLM", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (config("Gemma3ForCausalLM", final_logit_softcapping=30.0), "final_logit_softcapping"),
        (config("Gemma3ForCausalLM", use_bidirectional_attention=True), "bidirectional"),
        (config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (config(rope_scaling={"type": "longrope"}), "longrope"),
        (config(rope_parameters={"rope_type": "dynamic"}), "dynamic"),
        (config("Gemma3ForCausalLM", rope_parameters={"full_attention": {"rope_type": "longrope"}}), "longrope"),
    ],
)
def test_refused_with_a_reason(value, words):
    with pytest.raises(UnsupportedModelError, match=words):
        check_supported(value)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_scalings_by_position_alone_are_fine(kind):
    check_supported(config(rope_parameters={"rope_type": kind, "rope_theta": 1e4}))
    check_supported(config(rope_scaling={"rope_type": kind}))
    check_supported(config(rope_scaling=None))

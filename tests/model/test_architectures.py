"""What config.json of each architecture means, and what is refused by name."""

from typing import Any

import pytest
import transformers

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import ARCHITECTURES
from gta_edge.model.config import GQAConfig, parse_config
from tests.helpers.architectures import CASES, entries_of, model_of

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read(entries: dict[str, Any]) -> GQAConfig:
    config = parse_config(entries)
    assert isinstance(config, GQAConfig)
    return config


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_what_is_not_given_is_as_in_transformers(row: Any) -> None:
    theirs = getattr(transformers, row.name.replace("ForCausalLM", "Config"))(
        **dict(zip(REQUIRED, (97, 4096, 96, 8, 32), strict=True)), pad_token_id=None, bos_token_id=1, eos_token_id=2
    )
    entries = {"architectures": [row.name], "model_type": row.model_type, **{k: getattr(theirs, k) for k in REQUIRED}}
    if row.always_windowed:
        entries["sliding_window"] = None  # by default there is one
    config = read(entries)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name)
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (config.head_dim, config.rope_theta) == (width, theirs.rope_parameters["rope_theta"])
    rotates = getattr(theirs, "no_rope_layers", [1] * 8)
    assert config.unrotated_layers == tuple(i for i, each in enumerate(rotates) if not each)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_transformers_has(name: str) -> None:
    model, config = model_of(name), read(entries_of(name))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert config.parameter_shapes() == theirs
    assert config.parameters == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_the_type_or_the_architecture_is_enough(name: str) -> None:
    config = read(entries_of(name))
    assert read(entries_of(name, architectures=...)) == config
    assert read(entries_of(name, architectures=[])) == config
    assert read(entries_of(name, model_type=...)) == config
    assert read(entries_of(name, architectures=[config.architecture.replace("ForCausalLM", "Model")])) == config


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another type": ("Llama", {"model_type": "mistral"}, r"LlamaForCausalLM.* and model_type 'mistral'"),
    "experts": ("Qwen3", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
    "Mixtral": ("Mistral", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
    "Gemma": (
        "Llama",
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        "'gemma2'; expected one of",
    ),
    "a type alone": (
        "Llama",
        {"architectures": [], "model_type": "phi3"},
        "'phi3'; expected one of GTAForC",
    ),
    "Mistral's window": ("Mistral", {"sliding_window": 16}, "sliding_window is 16, below max_position_embeddings 64"),
    "Mistral's window, unsaid": (
        "Mistral",
        {"sliding_window": ..., "max_position_embeddings": 8192},
        "sliding_window is 4096",
    ),
    "Mistral's window, whatever else": (
        "Mistral",
        {"sliding_window": 16, "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
        "sliding_window is 16",
    ),
    "Qwen2's window": ("Qwen2", QWEN_WINDOW, "sliding_window is 16"),
    "Qwen3's window in one layer": (
        "Qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .*only full attention",
    ),
    "SmolLM3's window": ("SmolLM3", QWEN_WINDOW, "sliding_window is 16"),
    "layers without RoPE in a Llama": ("Llama", {"no_rope_layers": [1, 0]}, "no_rope_layers is"),
    "as many layers as there are": ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*each of 3 layers"),
    "other than 0 and 1": ("SmolLM3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers is"),
    "no interval": ("SmolLM3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    "a part of the head": ("Qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "norms in a Llama": ("Llama", {"qk_norm": True}, "qk_norm is True"),
    "another activation": ("Qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a cap": ("Mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "heads that do not divide": ("Qwen2", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(entries_of(name, **changes))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": 64}),  # as long as the model
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 16, "layer_types": ...}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": None, "layer_types": ...}),
        ("SmolLM3", {"use_sliding_window": False, "sliding_window": 16}),
    ],
)
def test_a_window_that_is_not_used_is_none(name: str, changes: dict[str, Any]) -> None:
    assert read(entries_of(name, **changes)) == read(entries_of(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "PhiForCausalLM"}, "architecture is 'PhiForCausalLM'"),
        ({"architecture": "MistralForCausalLM", "attention_bias": True}, "attention_bias is True"),
        ({"architecture": "Qwen3ForCausalLM", "mlp_bias": True}, "mlp_bias is True"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"layers_without_rope": (0,)}, "LlamaForCausalLM has RoPE in every layer"),
        ({"architecture": "SmolLM3ForCausalLM", "layers_without_rope": (2,)}, "layers without RoPE are"),
        ({"num_attention_heads": 2**20, "head_dim": 2**12}, "num_attention_heads times head_dim"),
    ],
)
def test_a_constructed_config_is_validated(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(entries_of("Llama")).replace(**changes)

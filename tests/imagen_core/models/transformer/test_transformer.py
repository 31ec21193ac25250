"""The patch transformer, against formulas written out here."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from imagen_core.models import Conditioning, UNetConfig
from imagen_core.models.layers.positions import grid_angles, grid_sinusoids, rotate_pairs
from imagen_core.models.transformer.blocks import PatchBlock, TokenAttention, TokenContext
from imagen_core.models.transformer.model import PatchTransformer
from tests.imagen_core.models.small import calls_of, inputs, random_weights, transformer

VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "cross": {"attention_type": "cross", "norm": "layer", "bias": True},
    "jit": {
        "attention_type": "self",
        "text_dim": None,
        "num_classes": 10,
        "num_class_tokens": 3,
        "class_tokens_from": 2,
        "fixed_positions": True,
        "bias": True,
    },
    "prx": {
        "norm": "layer",
        "text_norm": False,
        "bottleneck_bias": True,
        "mlp_activation": "geglu_tanh",
        "size_vector": True,
        "time_factor": 100.0,
    },
    "shared": {"time": "shared", "bottleneck_dim": None, "qk_norm": False, "dropped_caption": "zero_tokens"},
    "token": {"time": "token", "norm": "layer", "num_classes": 4, "num_class_tokens": 2},
    "token_cross": {"time": "token", "attention_type": "cross"},
    "super": {"low_res": True, "low_res_noise": True, "out_channels": 6, "position_scaling": "area"},
    "images": {"image_embed_dim": 10, "self_conditioning": True, "condition_channels": 2, "text_embed_dim": 7},
    "image_embed_only": {"text_dim": None, "image_embed_dim": 24, "attention_type": "cross"},
    "image_embed_vector": {"text_dim": None, "image_embed_dim": 10, "attention_type": "self"},
}
VARIANT = pytest.mark.parametrize("variant", list(VARIANTS))


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> PatchTransformer:
    return random_weights(transformer(**changes).build().to(dtype)).eval()


def inputs_of(model: PatchTransformer, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    x, c_noise, conditioning = inputs(model.config, dtype=dtype, **options)
    width = model.config.text_embed_dim
    if width is not None:
        generator = torch.Generator().manual_seed(9)
        embed = torch.randn(len(x), width, generator=generator, dtype=torch.float64).to(dtype)
        conditioning = replace(conditioning, text_embed=embed)
    return x, c_noise, conditioning


@VARIANT
def test_every_parameter_and_every_condition_has_an_effect(variant: str) -> None:
    model = build(**VARIANTS[variant])
    x, c_noise, conditioning = inputs_of(model)
    keep = torch.tensor([True, False])
    if model.config.text_embed_dim is not None:
        conditioning = replace(conditioning, text_keep=keep)
    if model.config.num_classes is not None:
        conditioning = replace(conditioning, labels_keep=keep)
    result = model(x, c_noise, conditioning)
    assert result.shape == (2, model.config.out_channels, 16, 16)
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not torch.allclose(result, model(x, c_noise + 1, conditioning))
    for name in ("text", "text_embed", "low_res", "low_res_noise", "labels", "image_embed", "images", "estimate"):
        value = getattr(conditioning, name)
        if value is not None:
            changed = value.flip(0) if name in ("text", "labels") else value + 1
            assert not torch.allclose(result, model(x, c_noise, replace(conditioning, **{name: changed}))), name


@VARIANT
def test_other_captions_lengths_and_rows_change_nothing(variant: str) -> None:
    model = build(**VARIANTS[variant])
    x, c_noise, conditioning = inputs_of(model)
    expected = model(x, c_noise, conditioning)
    padded = inputs_of(model, padded_to=11)[2]
    torch.testing.assert_close(model(x, c_noise, padded), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        model(x[1:], c_noise[1:], padded.rows(slice(1, 2))), expected[1:], rtol=1e-10, atol=1e-10
    )
    order = torch.tensor([1, 0])
    flipped = model(x[order], c_noise[order], conditioning.map(lambda t: t[order]))
    torch.testing.assert_close(flipped, expected[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention_type", ["fused", "cross"])
def test_the_order_of_conditions_does_not_matter_and_that_of_patches_does(attention_type: str) -> None:
    model = build(attention_type=attention_type)
    x, c_noise, conditioning = inputs_of(model, lengths=(5, 5), padded_to=5)
    expected = model(x, c_noise, conditioning)
    reverse = replace(conditioning, text=conditioning.text.flip(1))
    torch.testing.assert_close(model(x, c_noise, reverse), expected, rtol=1e-10, atol=1e-10)
    swapped = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    moved = model(swapped, c_noise, conditioning)
    assert not torch.allclose(torch.cat([moved[..., 8:], moved[..., :8]], dim=-1), expected, rtol=1e-2)


@pytest.mark.parametrize("attention_type", ["fused", "cross"])
@pytest.mark.parametrize(("option", "lengths"), [("zero_tokens", (4, 4)), ("no_tokens", (1, 6))])
def test_a_dropped_caption_is_not_seen(attention_type: str, option: str, lengths: tuple[int, int]) -> None:
    model = build(attention_type=attention_type, dropped_caption=option)
    x, c_noise, conditioning = inputs_of(model, lengths=lengths)
    x, c_noise = x[:1].expand(2, -1, -1, -1), c_noise[:1].expand(2)
    first, second = model(x, c_noise, conditioning.unconditional())
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    first, second = model(x, c_noise, conditioning)
    assert not torch.allclose(first, second, rtol=1e-3, atol=1e-3)
    nothing = inputs_of(model, lengths=(0, 0))[2]
    model(x, c_noise, nothing).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_empty_caption_takes_the_place_of_a_dropped_one() -> None:
    model = build(dropped_caption="empty_caption")
    x, c_noise, conditioning = inputs_of(model)
    with pytest.raises(ValueError, match="reads the empty caption instead; give null_text"):
        model(x, c_noise, conditioning.unconditional())
    empty = torch.randn(1, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dropped = model(x, c_noise, conditioning.with_null_text(empty).unconditional())
    alone = replace(conditioning, text=empty.expand(2, 1, -1), text_mask=torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(dropped, model(x, c_noise, alone), rtol=1e-10, atol=1e-10)


def test_an_unknown_label_is_a_dropped_one_and_a_learned_vector() -> None:
    model = build(**VARIANTS["jit"])
    x, c_noise, conditioning = inputs_of(model)
    unknown = model(x, c_noise, replace(conditioning, labels=torch.tensor([-1, -1])))
    torch.testing.assert_close(model(x, c_noise, conditioning.without("labels")), unknown, rtol=0, atol=0)
    embedding = model.inputs.labels.embedding  # type: ignore[union-attr]
    assert embedding.weight.shape == (11, 32)
    with torch.no_grad():
        embedding.weight[3] = embedding.weight[10]
    third = model(x, c_noise, replace(conditioning, labels=torch.tensor([3, 3])))
    torch.testing.assert_close(third, unknown, rtol=0, atol=0)


def test_identity_weights_give_the_image_itself() -> None:
    """Patches of (channel, row, column) go out where they came in: with an identity for every layer around the
    blocks, which add nothing, the network is the norm of each patch times its root mean square."""
    model = transformer(
        attention_type="self", text_dim=None, bottleneck_dim=None, dim=48, num_heads=3, time="token"
    ).build()
    model = model.double()
    with torch.no_grad():
        for layer in (model.patch_in, model.patch_out):
            layer.weight.copy_(torch.eye(48))  # type: ignore[operator, union-attr]
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float64).view(2, 3, 8, 12)
    result = model(x, torch.zeros(2).double(), Conditioning())
    for row, column in product(range(2), range(3)):
        patch = x[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        scale = (patch.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6).rsqrt()
        found = result[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(found, patch * scale, rtol=1e-12, atol=0)


def test_attention_is_the_formula_with_rotations_as_complex_numbers() -> None:
    """Queries and keys times e^(i angle): their product sees the difference of the places only."""
    config = transformer(dim=24, num_heads=3, depth=1)
    layer = random_weights(TokenAttention(config, "fused").double())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 24, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 4, 24, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1.0]).double(), torch.tensor([0, 1, 2, 0, 1, 2.0]).double()
    angles = grid_angles(rows, columns, 8, 100.0)
    found = layer(x, TokenContext(None, angles.cos(), angles.sin(), text, mask))

    def rms(values: Tensor, norm: nn.Module) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    w = dict(layer.named_parameters())
    expected = torch.zeros_like(x)
    for row, head in product(range(2), range(3)):
        part = slice(8 * head, 8 * head + 8)
        q = rms(x[row] @ w["to_q.weight"][part].T, layer.norm_q)
        k = rms(x[row] @ w["to_kv.weight"][:24][part].T, layer.norm_k)  # type: ignore[arg-type]
        v = x[row] @ w["to_kv.weight"][24:][part].T
        real = text[row][mask[row]]
        text_k = rms(real @ w["context_to_kv.weight"][:24][part].T, layer.norm_context_k)  # type: ignore[arg-type]
        text_v = real @ w["context_to_kv.weight"][24:][part].T
        # The head's pairs: two turn with the row, by 1 and 1/10 per patch, and two with the column.
        turns = torch.stack([rows, rows / 10, columns, columns / 10], dim=-1)
        q_c, k_c = (torch.view_as_complex(t.view(6, 4, 2)) * torch.exp(1j * turns) for t in (q, k))
        own = (q_c @ k_c.conj().T).real
        cross = torch.view_as_real(q_c).flatten(1) @ text_k.T
        weights = (torch.cat([own, cross], dim=-1) / 8**0.5).softmax(-1)
        expected[row] += weights @ torch.cat([v, text_v]) @ w["to_out.weight"][:, part].T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rotary_attention_sees_differences_of_places_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    rows, columns = torch.randn(2, 5, generator=generator, dtype=torch.float64) * 10

    def products(shift: float) -> Tensor:
        angles = grid_angles(rows + shift, columns - 2 * shift, 16, 10_000.0)
        return rotate_pairs(q, angles.cos(), angles.sin()) @ rotate_pairs(k, angles.cos(), angles.sin()).T

    torch.testing.assert_close(products(7.0), products(0.0), rtol=1e-10, atol=1e-10)


def test_fixed_positions_are_those_of_mae() -> None:
    """Sines and cosines of the column, then of the row: He et al. 2021 (arXiv 2111.06377), JiT."""
    found = grid_sinusoids(torch.tensor([3.0]).double(), torch.tensor([5.0]).double(), 8)
    five, three = torch.tensor([5.0, 0.05]).double(), torch.tensor([3.0, 0.03]).double()
    torch.testing.assert_close(found[0], torch.cat([five.sin(), five.cos(), three.sin(), three.cos()]))


@pytest.mark.parametrize("scaling", ["none", "area"])
def test_coordinates_at_another_size_are_scaled_where_configured(scaling: str) -> None:
    model = build(position_scaling=scaling)

    def last(height: int, width: int) -> list[float]:
        patches = torch.zeros(1, 1, height, width, dtype=torch.float64)
        angles, _ = model._place(patches, torch.zeros(1, 1, 1))
        return [float(angles[-1, 0]), float(angles[-1, 4])]  # the fastest of the row, and of the column

    assert last(4, 4) == [3.0, 3.0]
    assert last(8, 8) == ([7.0, 7.0] if scaling == "none" else [3.5, 3.5])
    assert last(2, 8) == [1.0, 7.0], "a bucket of the same area has its own coordinates"


@VARIANT
def test_the_model_runs_on_other_sizes_and_shapes(variant: str) -> None:
    model = build(**VARIANTS[variant])
    x, c_noise, conditioning = inputs_of(model, side_px=24)

    def narrow(image: Tensor) -> Tensor:
        return image[..., :12, :] if image.ndim == 4 else image

    result = model(x[..., :12, :], c_noise, conditioning.map(narrow))
    assert result.shape == (2, model.config.out_channels, 12, 24)
    assert result.isfinite().all()
    assert model.config.sides_divisor == 4
    with pytest.raises(ValueError, match=r"sides that are multiples of 4 px \(got \(12, 22\)\)"):
        model(x[..., :12, :22], c_noise, conditioning)


@torch.no_grad()
def test_an_image_twice_as_large_is_seen_as_the_small_one_where_coordinates_span_its_area() -> None:
    """Resolution transfer: of an image whose every patch occurs 2 x 2 times, the mean over these."""
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doubled = F.pixel_shuffle(F.pixel_unshuffle(x, 4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), 4)
    c_noise, errors = torch.zeros(1, dtype=torch.float64), {}
    for scaling in ("none", "area"):
        model = build(position_scaling=scaling, attention_type="self", text_dim=None)
        small, large = model(x, c_noise, Conditioning()), model(doubled, c_noise, Conditioning())
        patches = F.pixel_unshuffle(large, 4).unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
        errors[scaling] = float((F.pixel_shuffle(patches, 4) - small).norm() / small.norm())
    assert errors["area"] < 0.5 * errors["none"], errors


@VARIANT
def test_a_new_model_predicts_zero_and_its_blocks_add_nothing(variant: str) -> None:
    model = transformer(**VARIANTS[variant]).build()
    arguments = inputs_of(model, torch.float32)
    assert not model(*arguments).any()
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    model(*arguments)
    assert len(seen) == 4
    assert all(made.equal(given) for given, made in seen)


@pytest.mark.parametrize("recomputes", [False, True])
@VARIANT
def test_every_block_is_computed_again_in_the_backward_pass_where_configured(variant: str, recomputes: bool) -> None:
    plain = build(**VARIANTS[variant])
    model = build(**VARIANTS[variant], activation_checkpointing=recomputes)
    blocks = [module for module in model.modules() if isinstance(module, PatchBlock)]
    forward, backward = calls_of(blocks, model, *inputs_of(model))
    assert forward == [1] * len(blocks)
    assert backward == [int(recomputes)] * len(blocks)
    plain(*inputs_of(plain)).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_dropout_is_in_the_middle_half_of_the_blocks() -> None:
    rates = [block.dropout.p for block in transformer(depth=12, dropout=0.2).build().blocks]  # type: ignore[union-attr]
    assert rates == [0.0] * 3 + [0.2] * 6 + [0.0] * 3


@VARIANT
def test_channels_last_and_bfloat16_give_the_same_image(variant: str) -> None:
    model = build(torch.float32, **VARIANTS[variant])
    x, c_noise, conditioning = inputs_of(model, torch.float32)
    plain = model(x, c_noise, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, c_noise, conditioning)
    assert (half - plain).norm() < 0.05 * plain.norm()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strided = model(x.to(memory_format=torch.channels_last), c_noise, conditioning)
    torch.testing.assert_close(strided, plain, rtol=1e-4, atol=1e-4)
    rounded = conditioning.to("cpu", torch.bfloat16)
    exact = model.bfloat16()(x.bfloat16(), c_noise, rounded)
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - plain).norm() < 0.1 * plain.norm()


@pytest.mark.slow
@VARIANT
def test_the_model_compiles_as_one_graph(variant: str) -> None:
    model = build(torch.float32, **VARIANTS[variant])
    arguments = inputs_of(model, torch.float32)
    torch.compiler.reset()  # one limit of recompilations holds for all variants in a process
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_missing_conditions_are_named() -> None:
    model = build(low_res=True, low_res_noise=True, num_classes=4, text_embed_dim=7)
    x, c_noise, conditioning = inputs_of(model)
    for name in ("text", "text_embed", "low_res", "low_res_noise", "labels"):
        with pytest.raises(ValueError, match=f"conditioning.{name}:"):
            model(x, c_noise, replace(conditioning, **{name: None}))


@VARIANT
def test_a_configuration_survives_json(variant: str) -> None:
    config = transformer(**VARIANTS[variant])
    adapter: TypeAdapter[Any] = TypeAdapter(UNetConfig)
    assert adapter.validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size_px": 18}, "image_size_px 18 must be a multiple of patch_px 4"),
        ({"dim": 36}, r"dim must be a multiple of 4 times num_heads \(got 36 and 2\)"),
        ({"time_sinusoids": 9}, r"time_sinusoids must be even \(got 9\)"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01 times dim 32 is less than one channel"),
        ({"text_dim": None}, "attention_type 'fused' reads text, but text_dim is null; use 'self'"),
        ({"attention_type": "self"}, "attention_type self reads no captions, but text_dim is 12; set it to null"),
        ({"num_class_tokens": 2}, "num_class_tokens is 2, but num_classes is null; set both"),
        ({"class_tokens_from": 1}, "class_tokens_from is 1, for 0 num_class_tokens in 4 blocks"),
        (
            {"num_classes": 3, "num_class_tokens": 2, "class_tokens_from": 4},
            "class_tokens_from is 4, for 2 num_class_tokens in 4 blocks",
        ),
        ({"low_res_noise": True}, "low_res_noise needs low_res"),
        ({"dropped_caption": "empty_caption", "text_embed_dim": 7}, "dropped_caption=empty_caption is for a model"),
        (
            {"transcription": {"dim": 16, "depth": 1, "resolutions": (8,), "head_dim": 8}},
            "a patch transformer reads none; use family regular or efficient",
        ),
        ({"patch_px": 0}, "patch_px"),
        ({"heads": 2}, "Extra inputs"),
    ],
)
def test_wrong_configurations_are_refused_with_the_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        transformer(**changes)

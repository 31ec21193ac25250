"""One training step of a peer's UNet, timed. Runs in the peers' own environment and imports nothing of this project.

    python3 -m venv peers
    peers/bin/pip install torch imagen-pytorch dalle2-pytorch diffusers einops-exts resize-right
    peers/bin/pip install --no-deps minimagen

Called by `benchmarks.unet`: reads one line "NAME", then for each line "STEPS" prints one line of JSON with seconds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

BATCH, SIDE, TOKENS, WIDTH = 4, 32, 32, 512


def prepare() -> None:
    """Lets packages import that need torchvision's compiled operators, or the network, at import."""
    import torch
    import transformers

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    prepare.library = library  # type: ignore[attr-defined]

    class Config:
        d_model = WIDTH

    transformers.T5Config.from_pretrained = classmethod(lambda cls, *args, **kwargs: Config())


def imagen_pytorch(elucidated: bool) -> tuple[object, Callable[[], object]]:
    import torch
    from imagen_pytorch.elucidated_imagen import ElucidatedImagen
    from imagen_pytorch.imagen_pytorch import Imagen, Unet

    unet = Unet(
        dim=88, dim_mults=(1, 2, 4), num_resnet_blocks=1, layer_attns=(False, True, True),
        layer_cross_attns=(False, True, True), text_embed_dim=WIDTH,
    )  # fmt: skip
    kind = ElucidatedImagen if elucidated else Imagen
    extra = {"num_sample_steps": 10} if elucidated else {"timesteps": 1000}
    model = kind(unets=(unet,), image_sizes=(SIDE,), text_embed_dim=WIDTH, **extra)
    images, text = torch.rand(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, WIDTH)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return unet, lambda: model(images, text_embeds=text, text_masks=mask, unet_number=1)


def minimagen() -> tuple[object, Callable[[], object]]:
    import torch
    from minimagen.Imagen import Imagen
    from minimagen.Unet import Unet

    unet = Unet(
        dim=88, dim_mults=(1, 2, 4), num_resnet_blocks=1, layer_attns=(False, True, True),
        layer_cross_attns=(False, True, True), text_embed_dim=WIDTH,
    )  # fmt: skip
    model = Imagen(
        unets=(unet,), image_sizes=(SIDE,), timesteps=1000, text_encoder_name="t5_small", text_embed_dim=WIDTH
    )
    images, text = torch.rand(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, WIDTH)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return unet, lambda: model(images, text_embeds=text, text_masks=mask, unet_number=1)


def dalle2_pytorch() -> tuple[object, Callable[[], object]]:
    import torch
    from dalle2_pytorch import Decoder, Unet

    unet = Unet(
        dim=80, dim_mults=(1, 2, 4), image_embed_dim=WIDTH, text_embed_dim=WIDTH, cond_dim=128, channels=3,
        cond_on_text_encodings=True, num_resnet_blocks=2,
    )  # fmt: skip
    model = Decoder(unet=(unet,), image_sizes=(SIDE,), timesteps=1000, learned_variance=False)
    images, embed = torch.rand(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, WIDTH)
    text = torch.randn(BATCH, TOKENS, WIDTH)
    return unet, lambda: model(images, image_embed=embed, text_encodings=text, unet_number=1)


def diffusers() -> tuple[object, Callable[[], object]]:
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel

    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")
    up = ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
    unet = UNet2DConditionModel(
        sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(64, 192, 256),
        down_block_types=down, up_block_types=up, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=WIDTH, encoder_hid_dim=WIDTH, attention_head_dim=64, addition_embed_type="text",
        addition_embed_type_num_heads=8, act_fn="gelu", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    scheduler = DDPMScheduler()
    images, text = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1, torch.randn(BATCH, TOKENS, WIDTH)

    def loss() -> object:
        noise, times = torch.randn_like(images), torch.randint(0, 1000, (BATCH,))
        return F.mse_loss(unet(scheduler.add_noise(images, noise, times), times, text).sample, noise)

    return unet, loss


PEERS: dict[str, Callable[[], tuple[object, Callable[[], object]]]] = {
    "imagen-pytorch": lambda: imagen_pytorch(False),
    "imagen-pytorch, Elucidated": lambda: imagen_pytorch(True),
    "MinImagen": minimagen,
    "DALLE2-pytorch decoder": dalle2_pytorch,
    "diffusers, IF layout": diffusers,
}


def main() -> None:
    prepare()
    import torch

    name = sys.stdin.readline().strip()
    torch.manual_seed(0)
    unet, loss = PEERS[name]()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)  # type: ignore[attr-defined]
    serve(unet, loss, optimizer)


def serve(unet: object, loss: Callable[[], object], optimizer: object) -> None:
    """Answers each line "STEPS" with the seconds of this many training steps, the parameters and the peak memory."""
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss().backward()  # type: ignore[attr-defined]
            optimizer.step()  # type: ignore[attr-defined]
            optimizer.zero_grad()  # type: ignore[attr-defined]
            seconds.append(time.perf_counter() - start)
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "parameters": sum(p.numel() for p in unet.parameters()),  # type: ignore[attr-defined]
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()

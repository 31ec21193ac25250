"""Images sampled by a peer, timed. Runs in the peers' own environment and imports nothing of this project.

`unet_peers.py` says how to make that environment. Called by `benchmarks.sampling`: reads one line of JSON with the
name and the case, then for each line "TIMES" prints one line of JSON with seconds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
TOKENS, WIDTH, GUIDANCE, LOW_RES = 32, 512, 3.0, 64

Sampler = tuple[object, Callable[[], object]]
"""The network, and a function that samples one batch."""


def texts(batch: int) -> tuple[object, object]:
    import torch

    return torch.randn(batch, TOKENS, WIDTH), torch.ones(batch, TOKENS, dtype=torch.bool)


def imagen_pytorch(side: int, batch: int, steps: int) -> Sampler:
    import torch
    from imagen_pytorch.imagen_pytorch import Imagen, NullUnet, Unet

    text, mask = texts(batch)
    if side <= LOW_RES:
        unet = Unet(
            dim=88, dim_mults=(1, 2, 4), num_resnet_blocks=1, layer_attns=(False, True, True),
            layer_cross_attns=(False, True, True), text_embed_dim=WIDTH,
        )  # fmt: skip
        model = Imagen(unets=(unet,), image_sizes=(side,), text_embed_dim=WIDTH, timesteps=steps)
        return unet, lambda: model.sample(
            text_embeds=text, text_masks=mask, cond_scale=GUIDANCE, use_tqdm=False, return_all_unet_outputs=False
        )
    unet = Unet(
        dim=64, dim_mults=(1, 2, 4), num_resnet_blocks=2, layer_attns=False, layer_cross_attns=(False, False, True),
        text_embed_dim=WIDTH, memory_efficient=True, lowres_cond=True,
    )  # fmt: skip
    model = Imagen(unets=(NullUnet(), unet), image_sizes=(LOW_RES, side), text_embed_dim=WIDTH, timesteps=steps)
    small = torch.rand(batch, 3, LOW_RES, LOW_RES)
    return unet, lambda: model.sample(
        text_embeds=text, text_masks=mask, cond_scale=GUIDANCE, use_tqdm=False, start_at_unet_number=2,
        start_image_or_video=small,
    )  # fmt: skip


def dalle2_pytorch(side: int, batch: int, steps: int) -> Sampler:
    import torch
    from dalle2_pytorch import Decoder, Unet

    unet = Unet(
        dim=80, dim_mults=(1, 2, 4), image_embed_dim=WIDTH, text_embed_dim=WIDTH, cond_dim=128, channels=3,
        cond_on_text_encodings=True, num_resnet_blocks=2,
    )  # fmt: skip
    model = Decoder(unet=(unet,), image_sizes=(side,), timesteps=1000, sample_timesteps=steps, learned_variance=False)
    embed, (text, _) = torch.randn(batch, WIDTH), texts(batch)
    return unet, lambda: model.sample(image_embed=embed, text_encodings=text, cond_scale=GUIDANCE)


def diffusers(side: int, batch: int, steps: int) -> Sampler:
    import torch
    from diffusers import (
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        IFPipeline,
        IFSuperResolutionPipeline,
        UNet2DConditionModel,
    )

    low_res = side > LOW_RES
    cross_down, cross_up = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
    plain_down, plain_up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    down, up = (plain_down, cross_down, cross_down), (cross_up, cross_up, plain_up)
    if low_res:
        down, up = (plain_down, plain_down, plain_down, cross_down), (cross_up, plain_up, plain_up, plain_up)
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=6 if low_res else 3, out_channels=6, layers_per_block=1 if low_res else 2,
        block_out_channels=(64, 128, 192, 256) if low_res else (64, 192, 256), down_block_types=down,
        up_block_types=up, mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj", attention_head_dim=64, addition_embed_type="text",
        addition_embed_type_num_heads=8, act_fn="gelu", resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm", class_embed_type="timestep" if low_res else None,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, prediction_type="epsilon"
    )
    common = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    common |= {"tokenizer": None, "text_encoder": None, "unet": unet, "scheduler": scheduler}
    text, empty = texts(batch)[0], torch.randn(1, TOKENS, WIDTH).repeat(batch, 1, 1)
    more = {"prompt_embeds": text, "negative_prompt_embeds": empty, "num_inference_steps": steps, "output_type": "pt"}
    if low_res:
        pipeline = IFSuperResolutionPipeline(image_noising_scheduler=DDPMScheduler(), **common)
        more |= {"image": torch.rand(batch, 3, LOW_RES, LOW_RES) * 2 - 1}
    else:
        pipeline = IFPipeline(**common)
    pipeline.set_progress_bar_config(disable=True)
    return unet, lambda: pipeline(guidance_scale=GUIDANCE, **more)


PEERS: dict[str, Callable[[int, int, int], Sampler]] = {
    "imagen-pytorch": imagen_pytorch,
    "DALLE2-pytorch decoder": dalle2_pytorch,
    "diffusers, IF layout": diffusers,
}


def main() -> None:
    from unet_peers import prepare

    sys.path.pop(0)  # this folder, whose requests.py is not the package of that name
    prepare()
    import torch

    case = json.loads(sys.stdin.readline())
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    unet, sample = PEERS[case["name"]](case["side"], case["batch"], case["steps"])
    with torch.no_grad():
        serve(sum(p.numel() for p in unet.parameters()), sample)  # type: ignore[attr-defined]


def serve(parameters: int, sample: Callable[[], object]) -> None:
    """Answers each line "TIMES" with the seconds of this many samplings, the parameters and the peak memory."""

    for line in sys.stdin:
        wall, processor = [], []
        for _ in range(int(line)):
            start = time.perf_counter(), time.process_time()
            sample()
            wall.append(time.perf_counter() - start[0])
            processor.append(time.process_time() - start[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"wall": wall, "processor": processor, "parameters": parameters, "peak_bytes": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

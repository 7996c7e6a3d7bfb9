"""Every claim of the README and every contract, as a lesson in the order of the files: network,
losses, experts, data, training, dubbing. Drawn speakers only, no network. `pytest` runs it in about
five minutes on two cores.
"""
import csv
import dataclasses
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as fn

import audio
import common
import data
import experts
import faces
import infer
import lipreader
import lips
import lipsync
import loop
import losses
import media
import options
import sampling
import train
import watch
from audio import (ScratchEncoder, WhisperEncoder, in_windows, level_sound, log_mel,
                   parse_audio_encoder)
from bench import drawn, evaluate, metrics, progress, voice
from lips import LipHead, ReferenceWarp, lower_rows
from lipsync import SPADE, AudioSelector, Config, ImageEncoder, LipSync, ModalityFusion, check

HERE = pathlib.Path(__file__).parent
B, S, R, F, D = 2, 3, 4, 5, 24                   # all different, so that swapped axes cannot hide
SMALL = Config(image_size=64, refs=R, audio_encoder="scratch", audio_dim=D, window=F,
               decoder="spade", fold=1, channels=(5, 10, 15, 20, 25, 40), heads=2, spade_hidden=6)
CONV = dataclasses.replace(SMALL, decoder="conv", fold=2, channels=(10, 15, 20, 25, 40))


def command(*words, timeout=300, **options):
    """Runs one of our commands as a user does."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True,
                          text=True, timeout=timeout, **options)


def inputs(config, batch=B):
    torch.manual_seed(3)
    return lipsync.example(config, batch)[:3]


def moving(config, batch=B):
    """The same with amplitude and points."""
    torch.manual_seed(3)
    return lipsync.example(config, batch)


# ---------------------------------------------------------------- check and the trace
def test_check_names_the_tensor_the_axes_expected_and_the_shape_got():
    x = torch.zeros(2, 5, 7)
    assert check(x, "B F D", "fusion.audio", B=2) is x
    with pytest.raises(ValueError, match=r"fusion.audio must be \[B, F, D=8\], got \[2, 5, 7\]"):
        check(x, "B F D", "fusion.audio", D=8)
    with pytest.raises(ValueError, match=r"must be \[B, D\], got \[2, 5, 7\]"):
        check(x, "B D", "t.x")
    with pytest.raises(ValueError, match=r"\[B, B, D\]"):
        check(x, "B B D", "t.x")
    with pytest.raises(ValueError, match="must lie in 0..1"):
        check(x + 2, "B F D", "t.x", low=0, high=1)
    with pytest.raises(ValueError, match="must lie in 0..1"):
        check(x * math.nan, "B F D", "t.x", low=0, high=1)
    with pytest.raises(ValueError, match="tensor"):
        check([1], "B", "t.x")


def test_trace_records_what_really_passed_and_only_while_it_is_on():
    net = LipSync(CONV).eval()
    with common.trace() as rows, torch.no_grad():
        net(*inputs(CONV))
    assert ("lipsync.refs", "B R 3 H W", (B, R, 3, 64, 64)) in rows
    assert rows[-1] == ("decoder.picture", "B 3 H W", (B, 3, 64, 64))
    before = len(rows)
    net(*inputs(CONV))
    assert len(rows) == before


def test_python_lipsync_prints_shapes_parameters_and_macs():
    out = command("lipsync.py", "--preset", "edge").stdout
    assert "1 3 3 256 256" in out and "1 11 512" in out
    net = LipSync(lipsync.PRESETS["edge"])
    count = sum(p.numel() for p in net.parameters()) + sum(
        p.numel() for p in ScratchEncoder(512).parameters()
    )
    assert out.splitlines()[-1].split()[:2] == ["sum", f"{count:,}"]


def test_the_readmes_diagram_shows_tensors_that_the_trace_has_seen_and_it_stays_short():
    readme = (HERE / "README.md").read_text().splitlines()
    assert len(readme) <= 170
    diagram = "\n".join(readme).split("```mermaid")[1].split("```")[0]
    shown = {axes.replace(",", "") for axes in re.findall(r"\[(B, [^\]]+)\]", diagram)}
    _, rows = lipsync.record("edge")
    assert len(shown) >= 9, shown - {axes for _, axes, _ in rows}
    assert shown <= {axes for _, axes, _ in rows}, shown - {axes for _, axes, _ in rows}


def test_the_readme_lists_every_file_and_names_only_what_exists():
    readme = (HERE / "README.md").read_text()
    files = {path.name for path in HERE.glob("*.py")}
    assert files <= set(re.findall(r"`(\w+\.py)`", readme.split("## The network")[0]))
    modules = {module.__name__: module for module in (audio, data, experts, faces, lipreader,
                                                      lipsync, losses, media, train)}
    named = [(module, name) for module, name in re.findall(r"`(\w+)\.(\w+)`", readme)
             if module in modules and name != "py"]
    assert len(named) >= 12
    assert all(hasattr(modules[module], name) for module, name in named), named


WITH_SHAPES = """
    log_mel level_sound in_windows encode_batch build_audio_encoder half_mask folded_conv lower_rows
    audio_window attention position_code mouth_width smooth_blocks join_halves redraw mouth_loss
    cosine sync_loss lip_reading_loss reconstruction_loss discriminator_loss generator_loss
""".split()


def test_every_class_and_function_says_what_is_the_patents_and_what_is_ours():
    import inspect
    for module in (audio, lips, lipsync, losses):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") != module.__name__ or name in ("main", "example"):
                continue
            is_module = inspect.isclass(thing) and issubclass(thing, torch.nn.Module)
            if is_module or name in WITH_SHAPES:
                assert "Shapes:" in thing.__doc__, name
                assert "Patent:" in thing.__doc__ or "Choice:" in thing.__doc__, name
            elif inspect.isfunction(thing) and not name.startswith("_"):
                assert thing.__doc__, name


def test_no_line_is_longer_than_100_columns():
    for path in [*HERE.glob("*.py"), *HERE.glob("bench/*.py")]:
        lines = path.read_text().splitlines()
        assert not [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 100]


# ---------------------------------------------------------------- S2(1) audio encoders
def test_scratch_encoder_gives_25_features_a_second_that_hear_only_their_neighbourhood():
    encoder = ScratchEncoder(D).eval()
    for seconds in (0.1, 1, 2.02):
        assert encoder(torch.zeros(2, int(16000 * seconds))).shape == (2, round(25 * seconds), D)
    mel = torch.randn(1, 80, 200)
    changed = mel.clone()
    changed[..., 100] += 1
    moved = (encoder.encode_mel(mel) - encoder.encode_mel(changed)).abs().sum(-1)[0] > 0
    assert 23 <= moved.nonzero().min() <= 25 <= moved.nonzero().max() <= 28


def small_whisper():
    torch.manual_seed(1)
    dims = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=D, n_audio_head=2, n_audio_layer=4)
    return WhisperEncoder(dims)


def test_a_whisper_that_hears_other_mel_bands_is_refused():
    with pytest.raises(common.BadInput, match="128 mel bands"):     # large-v3
        WhisperEncoder(dict(n_mels=128, n_audio_ctx=1500, n_audio_state=D, n_audio_head=2,
                                    n_audio_layer=4))


def test_whisper_encoder_costs_what_the_sound_is_long_and_stays_frozen():
    encoder = small_whisper()
    encoder.train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    features = encoder(torch.rand(2, 48000) - 0.5)
    assert features.shape == (2, 75, D) and not features.requires_grad


def test_long_sound_is_encoded_in_windows_whose_seams_are_blended():
    seconds = 95
    wave = torch.linspace(-1, 1, seconds * 16000)
    # a feature that knows no window
    plain = lambda piece: piece.unflatten(0, (-1, 640)).mean(1, keepdim=True)
    whole = in_windows(plain, wave)
    assert whole.shape == (seconds * 25, 1) and torch.allclose(whole, plain(wave), atol=1e-5)
    lengths = []
    in_windows(lambda piece: (lengths.append(len(piece)), plain(piece))[1], wave)
    assert max(lengths) == 30 * 16000
    stepped = iter(range(100))
    ramp = in_windows(
        lambda piece: torch.full((len(piece) // 640, 1), float(next(stepped))), wave
    )
    # window 0 fades into window 1: never a step
    assert (ramp[1:] - ramp[:-1]).abs().max() < 0.01


def test_features_beside_a_seam_are_those_of_a_window_centred_there():
    encoder, seconds = small_whisper(), 95
    wave = torch.sin(torch.arange(seconds * 16000) * 0.05
                     * (1 + torch.sin(torch.arange(seconds * 16000) / 3000))) * 0.5
    features = encoder(wave[None])[0]
    for seam in (30, 60, 80):
        # [750, D]
        centred = encoder(wave[None, (seam - 15) * 16000:(seam + 15) * 16000])[0]
        near, there = features[(seam - 10) * 25:(seam + 10) * 25], centred[125:625]
        assert fn.cosine_similarity(near, there, dim=1).min() >= 0.95


@pytest.mark.parametrize("text, expected",
                         [("base", ("whisper", "base")), ("whisper", ("whisper", "base")),
                          ("whisper:tiny", ("whisper", "tiny")), ("scratch", ("scratch", "")),
                          ("hubert", ("hubert", "facebook/hubert-base-ls960")),
                          ("facebook/wav2vec2-base", ("wav2vec2", "facebook/wav2vec2-base"))])
def test_audio_encoder_names_are_understood(text, expected):
    assert parse_audio_encoder(text) == expected


def test_whisper_loads_from_full_and_encoder_only_files_and_a_missing_one_says_what_to_do(tmp_path):
    encoder = small_whisper()
    state = {f"encoder.{k}": v for k, v in encoder.encoder.state_dict().items()}
    wave = torch.rand(1, 16000) - 0.5
    for name, extra in (("encoder", {}),
                        ("full", {"decoder.token_embedding.weight": torch.zeros(2, 2)})):
        path = tmp_path / f"{name}.pt"
        torch.save({"dims": encoder.dims, "model_state_dict": {**state, **extra}}, path)
        again = lipsync.build_audio_encoder(Config(audio_encoder=str(path)))
        assert torch.equal(again(wave), encoder(wave))
    (tmp_path / "wrong.pt").write_text("no weights")
    with pytest.raises(common.BadInput, match="--audio-encoder scratch"):
        lipsync.build_audio_encoder(Config(audio_encoder=str(tmp_path / "wrong.pt")))


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(common.BadInput, match="pip install transformers"):
        lipsync.build_audio_encoder(Config(audio_encoder="hubert"))


# ---------------------------------------------------------------- S2(2) image encoder
@pytest.mark.parametrize("refs", range(1, 9))
def test_image_encoder_takes_one_to_eight_references_with_that_many_groups_plus_one(refs):
    config = dataclasses.replace(CONV, refs=refs)
    features, skips = ImageEncoder(config)(*inputs(config)[:2])
    assert features.shape[2:] == (2, 2) and [s.shape[2] for s in skips] == [32, 16, 8, 4]
    norms = [m for m in ImageEncoder(config).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(m.num_groups == refs + 1 for m in norms)


# ---------------------------------------------------------------- S2(3) audio feature selector
@pytest.mark.parametrize("spacing", (1, 2))
def test_changing_audio_feature_j_changes_exactly_the_frames_that_hear_it(spacing):
    config = dataclasses.replace(CONV, spacing=spacing)
    features, j = torch.randn(B, 30, D), 17
    changed = features.clone()
    changed[:, j] += 1
    select = AudioSelector(config)
    moved = (select(features) != select(changed)).flatten(2).any(2)[0].nonzero().flatten().tolist()
    assert moved == [j + spacing * k for k in range(-(F // 2), F // 2 + 1)]


def test_the_first_and_last_feature_repeat_at_the_edges():
    features = torch.arange(10.0)[None, :, None].expand(B, 10, D)
    chosen = AudioSelector(CONV)(features)[0, :, :, 0]
    assert chosen[0].tolist() == [0, 0, 0, 1, 2] and chosen[9].tolist() == [7, 8, 9, 9, 9]
    some = AudioSelector(CONV)(features, torch.tensor([[3, 9], [0, 1]]))
    assert some[0, 1, :, 0].tolist() == [7, 8, 9, 9, 9]
    assert some[1, 0, :, 0].tolist() == [0, 0, 0, 1, 2]


# ---------------------------------------------------------------- S2(4) fusion
def test_our_attention_is_torchs():
    q, k, v = (torch.randn(B, 3, n, 8) for n in (5, 7, 7))
    mask = torch.zeros(7)
    mask[:3] = -math.inf
    ours = lipsync.attention(q, k, v, mask)
    theirs = fn.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(5, 7))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_position_code_is_the_patents_formula():
    code = lipsync.position_code(11, 8)
    assert code[3, 4].item() == pytest.approx(math.sin(3 / 10000 ** (4 / 8)), abs=1e-6)
    assert code[3, 5].item() == pytest.approx(math.cos(3 / 10000 ** (4 / 8)), abs=1e-6)


def test_audio_tokens_never_look_at_the_upper_half_of_the_image():
    fusion = ModalityFusion(CONV)
    image, audio = torch.randn(B, 40, 4, 4, requires_grad=True), torch.randn(B, F, D)
    looked = []
    fusion.audio_norm.register_forward_hook(lambda _, __, out: looked.append(out))
    fusion(image, audio)
    looked[0].square().sum().backward()
    assert (image.grad[:, :, :2] == 0).all() and (image.grad[:, :, 2:] != 0).any(1).all()


def test_amplitude_is_not_normalised_away_and_a_batch_equals_a_loop():
    for config in (SMALL, CONV):
        net, (refs, masked, audio) = LipSync(config).eval(), inputs(config)
        with torch.no_grad():
            outputs = {a: net(refs, masked, audio, a) for a in (0.5, 1.0, 1.5)}
            assert (
                (outputs[0.5] - outputs[1.0]).abs().max()
                > 1e-5
                < (outputs[1.5] - outputs[1.0]).abs().max()
            )
            both = net(refs, masked, audio, torch.tensor([0.5, 1.5]))
        assert torch.allclose(both, torch.stack([outputs[0.5][0], outputs[1.5][1]]), atol=1e-5)


# ---------------------------------------------------------------- S2(5) decoder
def test_spade_with_zero_gamma_and_beta_is_its_plain_norm():
    spade, x, map = SPADE(6, 4, 5), torch.randn(B, 6, 7, 9), torch.randn(B, 4, 7, 9)
    for conv in (spade.gamma, spade.beta):
        torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
    assert torch.allclose(spade(x, map), fn.instance_norm(x), atol=1e-6)


def test_decoder_upsamples_five_times_and_ends_in_a_sigmoid():
    net = LipSync(dataclasses.replace(SMALL, warp=False)).eval()
    assert len(net.decoder.blocks) == 5
    with torch.no_grad():
        net.decoder.out.bias.fill_(50)
        assert (net(*inputs(SMALL))[:, :, 48:] == 1).all()  # below where the halves join


def test_a_silent_decoder_leaves_the_draft_which_is_made_of_reference_pixels():
    net, (refs, masked, audio) = LipSync(CONV).eval(), inputs(CONV)
    for conv in (net.decoder.out, net.decoder.mix.conv):
        torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
    with torch.no_grad():
        output = net(refs, masked, audio)
    assert torch.allclose(output[:, :, 48:], refs.mean(1)[:, :, 48:].clamp(1 / 255, 254 / 255),
                          atol=1e-4)


def test_the_draft_is_at_each_place_a_mixture_of_the_references_there():
    mix, refs = lipsync.ReferenceMix(5, R), torch.rand(B, R, 3, 64, 64)
    torch.nn.init.zeros_(mix.conv.weight)
    mix.conv.bias.data[:] = torch.tensor([0, 50.0, 0, 0])
    assert torch.allclose(mix(torch.randn(B, 5, 20, 32), refs), refs[:, 1, :, 24:], atol=1e-5)


def test_the_draft_takes_shade_from_all_references_and_detail_from_one():
    torch.manual_seed(0)
    mix, flat = lipsync.ReferenceMix(5, 2), torch.tensor([0.3, 0.6])[None, :, None, None, None]
    detail = 0.2 * (torch.rand(1, 2, 3, 64, 64) - 0.5)
    detail = detail - fn.interpolate(fn.avg_pool2d(detail[0], 4), scale_factor=4)  # no shade
    torch.nn.init.zeros_(mix.conv.weight)
    mix.conv.bias.data[:] = torch.tensor([0.0, 1.0])                              # 0.27 and 0.73
    draft = mix(torch.randn(1, 5, 10, 16), flat + detail)
    assert (draft.mean() - (0.27 * 0.3 + 0.73 * 0.6)).abs() < 0.01
    apart = [(draft - draft.mean() - one).std() for one in lower_rows(detail)[0]]
    assert apart[1] < 0.2 * apart[0]


def test_lower_rows_are_the_lower_half_and_an_eighth_above():
    x = torch.arange(16.0)[:, None].expand(16, 3)
    assert lower_rows(x)[:, 0].tolist() == list(range(6, 16))


def test_a_folded_convolution_is_a_convolution_of_torchs_pixel_unshuffle():
    x = torch.rand(B, 6, 16, 24)
    for fold, stride in ((1, 1), (2, 1), (4, 1), (2, 2)):
        conv = torch.nn.Conv2d(6 * fold ** 2, 5, 3, stride, padding=1)
        expected = conv(fn.pixel_unshuffle(x, fold))
        torch.testing.assert_close(lipsync.folded_conv(x, conv, fold), expected)


def test_smoothing_blocks_is_the_mean_of_fold_by_fold_pixels():
    x = torch.rand(B, 3, 12, 20)
    mean = lipsync.smooth_blocks(x, 4)
    torch.testing.assert_close(mean[:, :, 5, 7], x[:, :, 4:8, 6:10].mean((2, 3)))


def test_far_points_weigh_next_to_nothing_but_are_no_denormal_numbers():
    near = lips.gaussian(torch.linspace(0, 1, 9), torch.rand(B, 4), lips.ReferenceWarp.NARROW)
    assert near.shape == (B, 9, 4)
    assert 1e-14 < near.min() < 1e-12  # a product of two is still a normal float32


def test_the_lower_half_joins_the_upper_without_a_step_and_keeps_its_rest():
    torch.manual_seed(0)
    upper = torch.full((B, 3, 64, 40), 0.7) + 0.02 * torch.rand(B, 3, 64, 40)
    lower = torch.full((B, 3, 64, 40), 0.4) + 0.02 * torch.rand(B, 3, 64, 40)
    joined = lipsync.join_halves(upper, lower)
    assert (joined[:, :, 0] - upper[:, :, -1]).abs().mean() < 0.03
    assert torch.equal(joined[:, :, 16:], lower[:, :, 16:])
    assert (joined[:, :, 1:] - joined[:, :, :-1]).abs().max() < 0.07  # no new step further down


def test_halves_that_fit_are_left_as_they_are():
    upper = torch.rand(B, 3, 1, 1).expand(B, 3, 64, 40)
    assert (lipsync.join_halves(upper, upper) - upper).abs().max() < 1e-6


# ---------------------------------------------------------------- lips and the warp
def grid_points(count=12):
    """Points all over a picture, [1, 1, n, 2] picture widths"""
    at = (torch.arange(count) + 0.5) / count
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(1, 1, -1, 2)


def test_points_that_stay_leave_the_picture_as_it_is():
    refs, points = torch.rand(B, R, 3, 64, 64), torch.rand(B, R, 50, 2)
    assert (ReferenceWarp()(refs, points, points) - refs).abs().max() < 1e-3


def test_a_dot_moves_where_its_point_is_told_to_go():
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    picture = torch.exp(-((columns - 120.5) ** 2 + (rows - 180.5) ** 2) / 18)
    source = grid_points()
    target = source + torch.tensor([10 / 256, -6 / 256])
    moved = ReferenceWarp()(picture.expand(1, 1, 3, 256, 256), source, target)[0, 0, 0]
    centre = (columns * moved).sum() / moved.sum(), (rows * moved).sum() / moved.sum()
    assert abs(centre[0] - 130.5) < 0.5 and abs(centre[1] - 174.5) < 0.5


def test_a_turned_picture_comes_back_upright():
    torch.manual_seed(0)
    smooth = fn.interpolate(torch.rand(1, 3, 12, 12), size=256, mode="bicubic").clamp(0, 1)
    angle = math.radians(8)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    grid = fn.affine_grid(torch.cat([turn, torch.zeros(2, 1)], 1)[None], (1, 3, 256, 256),
                          align_corners=False)
    turned = fn.grid_sample(smooth, grid, padding_mode="border", align_corners=False)
    upright = grid_points(40)
    # where the upright picture's points lie in the turned one
    source = (upright - 0.5) @ turn + 0.5
    back = ReferenceWarp()(turned[None], source, upright)[0]
    inner = (slice(None), slice(None), slice(140, 200), slice(60, 196))
    assert (
        (back[inner] - smooth[inner]).abs().mean()
        < 0.015
        < (turned[inner] - smooth[inner]).abs().mean() / 3
    )


def test_gradients_reach_the_lips_through_the_warp():
    net, (refs, masked, audio, amplitude, points) = LipSync(CONV), moving(CONV)
    lips = points[:, 0, 1, :61].clone().requires_grad_()
    net(refs, masked, audio, amplitude, points, lips).square().sum().backward()
    assert (lips.grad != 0).any(1).all()


def test_half_precision_does_not_shake_the_warp():
    refs, points = torch.rand(B, R, 3, 64, 64), torch.rand(B, R, 50, 2)
    warp, target = ReferenceWarp(), points + 0.02
    exact = warp(refs, points, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert (warp(refs, points, target) - exact).abs().max() < 2e-3


def test_the_upper_half_of_a_reference_stays():
    refs, points = torch.rand(B, R, 3, 64, 64), torch.rand(B, R, 50, 2)
    moved = ReferenceWarp()(refs, points, points + 0.05)
    assert torch.equal(moved[:, :, :, :24], refs[:, :, :, :24])
    assert not torch.equal(moved[:, :, :, 40:], refs[:, :, :, 40:])


def test_the_lips_are_said_in_mouth_widths_relative_to_the_most_closed_reference():
    head, tokens = LipHead(CONV).eval(), torch.randn(B, F, 40)
    points = moving(CONV)[4]
    with torch.no_grad():
        near, far = head(tokens, points), head(tokens, 0.5 * points + 0.2)
        # a face half as large moves half as far
        assert torch.allclose(far, 0.5 * near + 0.2, atol=1e-5)
        torch.nn.init.zeros_(head.layers[-1].weight), torch.nn.init.zeros_(head.layers[-1].bias)
        assert torch.allclose(head(tokens, points), points[:, 0, 1, :61])


def test_the_lips_depend_on_the_frames_own_token_and_on_every_references_mouth():
    head = LipHead(CONV).eval()
    tokens, points = torch.randn(B, F, 40, requires_grad=True), moving(CONV)[4].requires_grad_()
    head(tokens, points).square().sum().backward()
    heard = tokens.grad.abs().sum((0, 2)) > 0
    assert heard.nonzero().flatten().tolist() == [F // 2]
    assert (points.grad[:, :, 1, :61].abs().sum((2, 3)) > 0).all()
    assert (points.grad[:, :, 0] == 0).all()


def test_the_network_draws_the_lips_that_it_predicts_and_obeys_given_ones():
    net, (refs, masked, audio, amplitude, points) = LipSync(CONV).eval(), moving(CONV)
    with torch.no_grad():
        lips = net.predict_lips(audio, amplitude, points)
        plain, given = (
            net(refs, masked, audio, amplitude, points),
            net(refs, masked, audio, amplitude, points, lips),
        )
        other = net(refs, masked, audio, amplitude, points, lips + 0.1)
        still = net(refs, masked, audio, amplitude)
    assert torch.equal(plain, given)
    assert not torch.equal(plain, other)
    assert not torch.equal(plain, still)


def test_without_warp_the_network_is_the_patents_plain_one():
    net, (refs, masked, audio, amplitude,
          points) = LipSync(dataclasses.replace(CONV, warp=False)).eval(), moving(CONV)
    assert net.lip_head is None and net.decoder.mix is None and net.sound_parameters() == []
    with torch.no_grad():
        assert torch.equal(net(refs, masked, audio, amplitude, points),
                           net(refs, masked, audio, amplitude))


def test_predicted_lips_need_exactly_the_sound_parameters():
    net, (_, _, audio, amplitude, points) = LipSync(CONV), moving(CONV)
    net.predict_lips(audio, amplitude, points).square().sum().backward()
    used = {name for name, p in net.named_parameters() if p.grad is not None}
    own = {id(p) for p in net.sound_parameters()}
    assert used == {name for name, p in net.named_parameters() if id(p) in own}


@pytest.mark.parametrize("given", [False, True])
def test_redraw_takes_and_gives_bytes_and_keeps_the_upper_half(given):
    net, (_, _, audio, _, points) = LipSync(CONV).eval(), moving(CONV)
    rng = np.random.default_rng(0)
    refs, crops = (rng.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (R, B))
    wanted = points[:, -1, 1, :lips.MOUTH_POINTS] + 0.01 if given else None
    made = lipsync.redraw(net, refs, crops, points.numpy(), audio, 1.5,
                          wanted.numpy() if given else None)
    assert made.shape == crops.shape
    assert made.dtype == np.uint8
    assert np.array_equal(made[:, :32], crops[:, :32])
    planes = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (refs, crops)]
    with torch.no_grad():
        direct = net(planes[0].expand(B, -1, -1, -1, -1), planes[1], audio, 1.5, points, wanted)
    assert np.abs(made[:, 32:] - 255 * direct[:, :, 32:].permute(0, 2, 3, 1).numpy()).max() <= 0.51


# ---------------------------------------------------------------- one loudness for every sound
def test_soft_speech_and_a_far_click_give_the_same_features_as_speech_alone():
    rng = np.random.default_rng(0)
    speech = voice.synthesize(drawn.Speaker.draw(1), voice.syllable_timeline(rng, 14.0)[2], rng)
    soft, clicked = speech * 10 ** (-30 / 20), speech.copy()
    clicked[-1000:-900] = 0.99
    exact = log_mel(level_sound(speech))
    near = slice(0, 400)                          # the first 4 s, 10 s before the click
    for other in (soft, clicked):
        assert (log_mel(level_sound(other)) - exact)[:, near].abs().max() < 0.03
    assert level_sound(np.zeros(16000)).abs().max() == 0
    assert level_sound(speech).abs().max() <= 1


def test_log_mel_is_whispers_but_for_a_floor_that_does_not_move():
    import whisper
    rng = np.random.default_rng(0)
    wave = level_sound(voice.synthesize(drawn.Speaker.draw(1),
                                                voice.syllable_timeline(rng, 3.0)[2], rng))
    ours, theirs = log_mel(wave), whisper.log_mel_spectrogram(wave)
    loud = (theirs > theirs.min() + 0.05) & (ours > ours.min() + 0.05)
    assert ours.shape == theirs.shape and (ours - theirs)[loud].abs().max() < 1e-3


# ---------------------------------------------------------------- S2 the whole network
@pytest.mark.parametrize("config", (SMALL, CONV), ids=("spade", "conv"))
def test_output_depends_on_sound_references_and_upper_half_but_not_on_the_hidden_lower_half(config):
    net = LipSync(config).eval()
    refs, masked, audio = (x.requires_grad_() for x in inputs(config))
    net(refs, masked, audio)[:, :, 32:].square().sum().backward()
    assert (refs.grad.flatten(2).abs().sum(2) > 0).all() and (audio.grad.abs().sum(2) > 0).all()
    assert masked.grad[:, :, :32].abs().sum() > 0 and (masked.grad[:, :, 32:] == 0).all()
    with torch.no_grad():
        spoiled = masked.clone()
        spoiled[:, :, 32:] = 0.7
        assert torch.equal(net(refs, masked, audio), net(refs, spoiled, audio))


@pytest.mark.parametrize("config", (SMALL, CONV), ids=("spade", "conv"))
def test_gradients_reach_every_parameter(config):
    config = dataclasses.replace(config, dropout=0.0)
    net = LipSync(config)
    net(*moving(config)).square().mean().backward()
    silent = [name for name,
              p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    # softmax does not see a key's bias
    assert all(name.endswith("key.bias") for name in silent), silent
    checkpointed = LipSync(dataclasses.replace(config, checkpointing=True))
    checkpointed.load_state_dict(net.state_dict())
    checkpointed(*moving(config)).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), checkpointed.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_wrong_inputs_are_refused_by_name():
    net, (refs, masked, audio) = LipSync(CONV), inputs(CONV)
    image, skips = net.image_encoder(refs, masked)
    for name, call in {"lipsync.refs": lambda: net(refs[:, :3], masked, audio),
                       "lipsync.masked": lambda: net(refs, masked[:1], audio),
                       "lipsync.audio": lambda: net(refs, masked, audio[:, :4]),
                       "image.refs": lambda: net.image_encoder(refs * 255, masked),
                       "image.masked": lambda: net.image_encoder(refs, masked - 1),
                       "fusion.image": lambda: net.fusion(image[:, :3], audio),
                       "fusion.audio": lambda: net.fusion(image, audio[..., :3]),
                       "fusion.amplitude": lambda: net.fusion(image, audio, -1.0),
                       "selector.features": lambda: AudioSelector(CONV)(audio[0]),
                       "image.stage_in": lambda: net.image_encoder.stages[0](image),
                       "fusion.attention_to": lambda: net.fusion.audio_to_image(image.flatten(2).mT,
                                                                                audio),
                       "decoder.masked": lambda: net.decoder(image, skips, refs, masked[:, :, 2:]),
                       "decoder.mix_in": lambda: net.decoder.mix(image[:, :7], refs),
                       "decoder.mix_refs": lambda: net.decoder.mix(image[:, :10], refs[:, :3]),
                       "lipsync.points": lambda: net(refs, masked, audio, 1.0,
                                                     torch.zeros(B, R, 2, 70)),
                       "warp.target": lambda: net.warp(refs, torch.zeros(B, R, 9, 2),
                                                       torch.zeros(B, R, 8, 2)),
                       "decoder.fused": lambda: net.decoder(image[:, :3], skips, refs, masked),
                       "decoder.spade_map": lambda: SPADE(4, 3, 2)(torch.zeros(1, 4, 5, 6),
                                                                   torch.zeros(1, 3, 6, 5)),
                       "audio.wave": lambda: ScratchEncoder(4)(torch.full((1, 16000),
                                                                                  300.0))}.items():
        with pytest.raises(ValueError, match=name):
            call()
    for wrong in (dict(refs=9), dict(window=4), dict(decoder="gan"), dict(image_size=100),
                  dict(channels=(8, 8)), dict(fold=3), dict(heads=0)):
        with pytest.raises(ValueError, match="Config"):
            dataclasses.replace(CONV, **wrong)


def test_bfloat16_weights_draw_nearly_the_same_picture():
    for config in (SMALL, CONV):
        net = LipSync(config).eval()
        with torch.no_grad():
            exact = net(*moving(config))
            rough = net.to(torch.bfloat16)(*moving(config))
        assert rough.dtype == torch.float32 and (exact - rough).abs().max() < 0.03


def test_network_compiles_as_one_graph_and_exports_with_a_free_batch(tmp_path):
    for config in (SMALL, CONV):
        net = LipSync(config).eval()
        with torch.no_grad():
            expected = net(*moving(config))
            compiled = torch.compile(net, fullgraph=True, backend="eager")
            assert torch.allclose(compiled(*moving(config)), expected, atol=1e-4)
    file = tmp_path / "net.pt2"
    assert command("lipsync.py", "--preset", "tiny", "--export", file).returncode == 0
    code = (
        f"import torch, lipsync; p = torch.export.load({str(file)!r}).module();"
        "x = lipsync.example(lipsync.PRESETS['tiny'], 3); torch.manual_seed(0); net = "
        "lipsync.LipSync(lipsync.PRESETS['tiny']).eval();"
        "print((p(*x) - net(*x)).abs().max().item() < 1e-4)"
    )
    result = command("-c", code)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile builds C++ on a CPU")
def test_what_broke_inductor_compiles_and_has_the_same_gradients():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.tensor([0, -math.inf, 0, 0, 0])
    picture = torch.rand(2, 3, 32, 24).to(memory_format=torch.channels_last)
    for function, start in (
            (lambda x: lipsync.attention(x, key, value, mask), query),
            (lambda x: lipsync.join_halves(x, lipsync.smooth_blocks(x, 4)), picture)):
        gradients = []
        for f in (function, torch.compile(function, fullgraph=True)):
            x = start.clone().requires_grad_()
            f(x).square().sum().backward()
            gradients.append(x.grad)
        assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("preset", lipsync.PRESETS)
def test_every_number_of_references_trains_a_step_in_every_preset(preset):
    for refs in range(1, 9):
        config = dataclasses.replace(
            lipsync.PRESETS[preset],
            refs=refs,
            image_size=64,
            audio_dim=8,
            heads=4,
            channels=tuple(8 * (i + 1) for i in range(len(lipsync.PRESETS[preset].channels))),
        )
        net = LipSync(config)
        net(*lipsync.example(config, 2)).mean().backward()
        assert net.fusion.adapter[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- S3 losses
def test_sync_loss_of_three_four_against_four_three_is_minus_log_of_24_over_25():
    audio, video = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert losses.sync_loss(audio, video).item() == pytest.approx(-math.log(24 / 25), abs=1e-6)
    assert losses.sync_loss(audio, video, 0.0).item() == pytest.approx(-math.log(1 / 25), abs=1e-4)


def test_sync_loss_averages_rows_with_labels_of_their_own():
    audio, video = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [4.0, 3.0]])
    expected = (-math.log(0.96) - math.log(0.04)) / 2
    assert losses.sync_loss(audio, video,
                            torch.tensor([1.0, 0.0])).item() == pytest.approx(expected, abs=1e-4)


def test_sync_loss_stays_finite_for_zero_equal_and_orthogonal_embeddings():
    zero, one, other = (
        torch.zeros(2, 3),
        torch.tensor([[1.0, 0, 0]] * 2),
        torch.tensor([[0, 1.0, 0]] * 2),
    )
    for sound, video, label in ((zero, one, 1), (zero, zero, 1), (one, one, 0), (one, other, 1),
                                (one, one, 1)):
        video = video.clone().requires_grad_()
        loss = losses.sync_loss(sound, video, label)
        loss.backward()
        assert 0 <= loss.item() < 13.9 and video.grad.isfinite().all()


def test_sync_loss_has_a_gradient_where_sound_and_lips_have_nothing_in_common():
    audio, video = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]], requires_grad=True)
    losses.sync_loss(audio, video).backward()
    # 1e6 would outweigh every other pair of a batch
    assert video.grad[0, 0] == pytest.approx(-100)


def test_sync_loss_has_the_gradient_of_binary_cross_entropy_between_its_ends():
    audio = torch.rand(3, 6)
    for label in (0.0, 1.0):
        video, twin = (torch.arange(18.0).view(3, 6).requires_grad_() for _ in range(2))
        losses.sync_loss(audio, video, label).backward()
        fn.binary_cross_entropy(losses.cosine(audio, twin), torch.full((3,), label)).backward()
        assert torch.allclose(video.grad, twin.grad, rtol=1e-3, atol=1e-6)


def test_sync_loss_pulls_the_video_towards_its_sound():
    audio, video = torch.rand(2, 6), torch.rand(2, 6).requires_grad_()
    before = losses.sync_loss(audio, video)
    before.backward()
    assert losses.sync_loss(audio, (video - 0.1 * video.grad).relu()) < before


def test_sync_loss_refuses_negative_embeddings_and_other_widths():
    with pytest.raises(ValueError, match="negative"):
        losses.sync_loss(torch.tensor([[1.0, -0.1]]), torch.tensor([[1.0, 1.0]]))
    with pytest.raises(ValueError, match="video_embedding"):
        losses.sync_loss(torch.rand(2, 4), torch.rand(2, 5))


def test_lip_reading_loss_of_a_clueless_reader_is_log_of_the_vocabulary():
    logits, tokens = torch.zeros(2, 4, 7), torch.tensor([[1, 2, 3, 6], [4, 6, 6, 6]])
    assert losses.lip_reading_loss(logits, tokens, pad=6).item() == pytest.approx(
        math.log(7), abs=1e-6
    )


def test_lip_reading_loss_weighs_tokens_alike_and_ignores_padding():
    logits, tokens = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 4]])
    logits[0, :, :] = 0
    logits[1, 0, 3] = math.log(4)                 # P = 4 / (4 + 4) = 1/2
    logits[1, 1:] = torch.randn(2, 5) * 100       # padding: anything
    assert losses.lip_reading_loss(logits, tokens, pad=4).item() == pytest.approx(
        (3 * math.log(5) + math.log(2)) / 4, abs=1e-5
    )


def test_lip_reading_loss_without_any_token_is_zero():
    assert losses.lip_reading_loss(torch.randn(2, 3, 5), torch.full((2, 3), 4), pad=4).item() == 0


def test_reconstruction_loss_is_the_mean_absolute_difference():
    output, target = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    output[0, 0, 0, 0], output[0, 2, 1, 1] = 0.6, -0.6
    assert losses.reconstruction_loss(output, target).item() == pytest.approx(0.1)


def test_reconstruction_loss_weighs_the_mouth():
    output, target, mask = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2)
    output[0, :, 1, 1], mask[0, 0, 1, 1] = 0.5, 1
    # weights 1 1 1 5 -> (5 * 0.5) / 8
    assert losses.reconstruction_loss(output, target, 4.0, mask).item() == pytest.approx(0.3125)
    assert losses.reconstruction_loss(output, target, 0.0, mask).item() == pytest.approx(0.125)
    with pytest.raises(ValueError, match="mask"):
        losses.reconstruction_loss(output, target, 4.0)


def test_perceptual_loss_equals_the_patents_sum_over_w_h_c():
    net, vgg = losses.PerceptualLoss("random", layers=(1, 6)), losses.load_vgg("random")
    output, target = torch.rand(1, 3, 64, 96), torch.rand(1, 3, 64, 96)
    expected = 0
    for step in (1, 2, 4):
        a, b = (fn.avg_pool2d(x, step) for x in (output, target))
        a, b = ((x - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                / torch.tensor([0.229, 0.224, 0.225])[:, None, None] for x in (a, b))
        for stop in (2, 7):
            u, v = vgg[:stop](a), vgg[:stop](b)
            _, C, H, W = u.shape
            expected += ((u - v).abs().sum() / (W * H * C)).item()
    assert net(output, target).item() == pytest.approx(expected, rel=1e-5)
    assert net(target, target).item() == 0


def test_perceptual_loss_is_frozen_and_its_gradient_reaches_the_output_only():
    net = losses.PerceptualLoss("random", layers=(1, 6)).train()
    assert not any(module.training for module in net.modules())
    output, target = (
        torch.rand(1, 3, 64, 64, requires_grad=True),
        torch.rand(1, 3, 64, 64, requires_grad=True),
    )
    net(output, target).backward()
    assert output.grad.abs().sum() > 0
    assert target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_random_vgg_is_the_same_everywhere_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = losses.load_vgg("random"), losses.load_vgg("random")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].weight, second[0].weight)


def test_vgg_weights_come_from_a_file_and_a_foreign_file_is_refused(tmp_path):
    state = {f"features.{name}": value + 1 for name,
             value in losses.load_vgg("random").state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    assert torch.equal(losses.load_vgg(str(tmp_path / "vgg.pth"))[0].bias, torch.ones(64))
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"x": 1}, tmp_path / "other.pth")
    for name, words in (("text.pth", "not VGG-19"), ("other.pth", "not VGG-19"),
                        ("missing.pth", "cannot be read")):
        with pytest.raises(common.BadInput, match=words) as caught:
            losses.PerceptualLoss(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_imagenet_weights_without_a_network_name_the_remedy(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(common.BadInput, match="--vgg FILE") as caught:
        losses.PerceptualLoss("imagenet")
    assert "--vgg random" in str(caught.value)
    assert "vgg19-dcbb9e9d.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_discriminator_judges_patches_at_every_scale():
    logits = losses.Discriminator(scales=3, channels=4)(torch.rand(2, 3, 64, 128))
    assert [tuple(x.shape) for x in logits] == [(2, 1, 8, 16), (2, 1, 4, 8), (2, 1, 2, 4)]


def test_discriminator_layers_have_spectral_norm_one():
    net = losses.Discriminator(scales=1, channels=8)
    for _ in range(30):
        net(torch.rand(1, 3, 32, 32))
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(
                1, abs=0.05
            )


def test_gan_losses_equal_the_patents_logs_where_those_are_finite():
    real, fake = (
        [torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 2)],
        [torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 2)],
    )
    D = torch.sigmoid
    disc = sum((1 - D(f)).log().mean() + D(r).log().mean() for r, f in zip(real, fake)) / 2
    gen = sum((1 - D(f)).log().mean() for f in fake) / 2
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(-disc.item(), rel=1e-5)
    assert losses.generator_loss(fake, "patent").item() == pytest.approx(gen.item(), rel=1e-5)
    assert losses.generator_loss(fake).item() == pytest.approx(
        -sum(D(f).log().mean() for f in fake).item() / 2, rel=1e-5
    )


def test_gan_losses_stay_finite_where_the_patents_logs_do_not():
    real, fake = [torch.tensor([[[[-200.0]]]])], [torch.tensor([[[[200.0]]]])]
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(400)
    assert losses.generator_loss(fake, "patent").item() == pytest.approx(-200)
    with pytest.raises(ValueError, match="form"):
        losses.generator_loss(fake, "wasserstein")
    with pytest.raises(ValueError, match="form"):
        losses.discriminator_loss(real, fake, "wasserstein")


def test_hinge_losses_are_zero_for_a_sure_discriminator_and_two_for_a_clueless_one():
    sure, unsure = [torch.full((1, 1, 2, 2), 3.0)], [torch.zeros(1, 1, 2, 2)]
    assert losses.discriminator_loss(sure, [-sure[0]], "hinge").item() == 0
    assert losses.discriminator_loss(unsure, unsure, "hinge").item() == 2
    assert losses.generator_loss(sure, "hinge").item() == -3


def test_mouth_loss_is_the_distance_in_mouth_widths_with_lips_counting_three_times():
    target = torch.zeros(1, 61, 2)
    lips, jaw = target.clone(), target.clone()
    lips[0, :40] = torch.tensor([0.03, 0.04])     # 0.05 picture widths off, a quarter of a mouth's
    jaw[0, 40:] = torch.tensor([0.03, 0.04])
    width = torch.tensor([0.2])
    assert losses.mouth_loss(lips, target, width).item() == pytest.approx(
        0.25 * 120 / 141, rel=1e-5
    )
    assert losses.mouth_loss(jaw, target, width).item() == pytest.approx(0.25 * 21 / 141, rel=1e-5)


# ---------------------------------------------------------------- experts
@pytest.mark.parametrize("audio, sound", [("features", (3, 5, 24)), ("mel", (3, 80, 20))])
def test_sync_expert_embeddings_are_never_negative_and_fit_the_sync_loss(audio, sound):
    net = experts.SyncXNet("small", audio, audio_dim=24).eval()
    video, heard = net.embed_video(torch.rand(3, 5, 3, 128,
                                              256)), net.embed_audio(torch.randn(sound))
    assert video.shape == heard.shape and video.min() >= 0 and heard.min() >= 0
    assert losses.sync_loss(heard, video).isfinite()


def test_a_frozen_sync_expert_passes_the_gradient_on_to_the_pictures():
    net, pictures = (
        experts.SyncXNet("small", audio_dim=24).eval().requires_grad_(False),
        torch.rand(2, 5, 3, 128, 256, requires_grad=True),
    )
    losses.sync_loss(net.embed_audio(torch.randn(2, 5, 24)), net.embed_video(pictures)).backward()
    assert (pictures.grad.abs().sum((0, 2, 3, 4)) > 0).all()      # every one of the five frames


def test_small_experts_keep_to_their_budget():
    assert sum(p.numel() for p in experts.SyncXNet("small").parameters()) <= 1.5e6
    assert sum(p.numel() for p in lipreader.LipReader("small").parameters()) <= 2e6


def test_full_sync_expert_is_a_resnext_with_fifteen_input_planes():
    net = experts.SyncXNet("full", audio_dim=24).eval()
    assert net.video.conv1.in_channels == 15
    with torch.no_grad():
        assert (
            net.embed_video(torch.rand(1, 5, 3, 64, 128)).shape
            == net.embed_audio(torch.randn(1, 5, 24)).shape
        )


def test_mouth_view_averages_pixel_pairs_and_leaves_a_view_alone():
    pictures = torch.rand(2, 3, 3, 128, 256)
    view = lipreader.mouth_view(pictures, 40)
    assert torch.allclose(view[1, 2, 0, 0, 0], pictures[1, 2, 0, 8:10, 48:50].mean())
    assert lipreader.mouth_view(view, 40) is view


def test_sync_curve_finds_how_late_the_sound_is():
    vectors = torch.rand(40, 16)
    for late in (-7, 0, 4):
        sound = torch.rand(40, 16)
        lo, hi = max(0, late), 40 + min(0, late)
        # what the lips do at i is heard at i + late
        sound[lo:hi] = vectors[lo - late:hi - late]
        curve = experts.sync_curve(vectors, sound)
        offset, distance, confidence = experts.read_curve(curve)
        assert offset == late and distance == pytest.approx(0, abs=1e-3)
        assert confidence == pytest.approx(float(curve.nanmedian()), abs=1e-3)


def test_sync_curve_ignores_frames_without_a_face():
    vectors, valid = torch.rand(40, 16), torch.ones(40, dtype=torch.bool)
    lips = vectors.clone()
    lips[10:20], valid[10:20] = torch.rand(10, 16), False
    assert experts.sync_curve(lips, vectors, valid)[experts.MAX_SHIFT].item() == pytest.approx(
        0, abs=1e-3
    )


class Twins(torch.nn.Module):
    """A sync expert that knows: the embedding is the first frame's first pixel / first feature, as
    a one-hot."""

    def __init__(self):
        super().__init__()
        self.config, self.anchor = dict(size="small",
                                        audio="features"), torch.nn.Parameter(torch.zeros(1))

    def embed_video(self, pictures):
        return fn.one_hot((pictures[:, 0, 0, 0, 0] * 255).round().long(), 256).float()

    def embed_audio(self, sound):
        return fn.one_hot(sound[:, 0, 0].round().long(), 256).float()


def test_measure_offset_reports_late_sound_as_positive():
    pictures = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 4, 8)
    for late in (-3, 0, 6):
        result = experts.measure_offset(
            Twins(), pictures, (torch.arange(62.0) - late).clamp(0, 255)[:, None].expand(62, 2)
        )
        assert result["offset"] == late and result["distance"] == pytest.approx(0, abs=1e-3)
        assert result["confidence"] == pytest.approx(2**0.5, abs=1e-3)
        assert len(result["curve"]) == 31


def test_measure_offset_manages_with_few_frames_that_show_a_face():
    pictures, found = (
        torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 4, 8),
        torch.arange(60) < 10,
    )
    result = experts.measure_offset(Twins(), pictures,
                                    (torch.arange(60.0) - 2).clamp(0, 255)[:, None].expand(60, 2),
                                    found.numpy())
    assert result["offset"] == 2 and result["distance"] == pytest.approx(0, abs=1e-3)


def test_measure_offset_says_when_there_is_nothing_to_measure():
    for frames, found in ((3, None), (20, torch.arange(20) % 3 > 0)):
        with pytest.raises(common.BadInput, match="nothing to measure"):
            experts.measure_offset(Twins(), torch.zeros(frames, 3, 4, 8), torch.zeros(frames, 2),
                                   found)


def test_an_opening_that_follows_the_voice_correlates_with_it_and_rests_in_pauses():
    # a second of voice, a second of silence, twice
    voice = np.repeat([0.3, 0, 0.3, 0], 25)
    wave = np.repeat(voice, common.SAMPLES_PER_FRAME)
    found = np.arange(100) != 3
    result = experts.measure_opening(np.where(found, 1 + 30 * voice, 12), wave, found)
    assert result["r_loudness"] > 0.95
    assert result["opening_pause"] == 1
    assert 8 < result["opening_speech"] <= 10
    late = experts.measure_opening(1 + 30 * np.roll(voice, 25), wave, found)
    assert late["r_loudness"] < -0.9 and late["opening_pause"] > 9


def test_a_still_mouth_follows_no_voice_and_silence_is_no_number_but_valid_json():
    wave = (
        np.random.default_rng(0).normal(size=640 * 50).astype(np.float32)
        * np.repeat(np.arange(50) % 10, 640)
        / 10
    )
    found = np.ones(50, bool)
    # 0.985 with zeros beyond the ends
    assert experts.measure_opening(np.full(50, 7.0), wave, found)["r_loudness"] == 0
    # a still picture's mouth, as it is tracked: not quite still
    unsteady = 7 + 0.3 * wave.reshape(50, 640).std(1)
    # 1.0 where any deviation counts
    assert experts.measure_opening(unsteady, wave, found)["r_loudness"] == 0
    silent = experts.measure_opening(np.arange(50.0), np.zeros(640 * 50, np.float32), found)
    assert silent["r_loudness"] is None and "NaN" not in json.dumps(silent)
    assert experts.measure_opening(np.arange(3.0), wave, found)["r_loudness"] is None


def test_a_video_of_three_frames_is_one_line_and_no_traceback(dubbing, trained, tmp_path):
    ffmpeg("-i", dubbing / "clip.mp4", "-t", 0.12, "-c:a", "aac", tmp_path / "three.mp4")
    result = command("experts.py", tmp_path / "three.mp4", "--weights", trained[0] / "weights.pt")
    assert result.returncode == 2
    assert "three.mp4" in result.stderr
    assert "Traceback" not in result.stderr


def test_sync_accuracy_counts_true_pairs_and_sounds_without_a_common_frame_alike():
    assert experts.sync_accuracy(torch.eye(16), torch.eye(16)) == 1
    assert experts.sync_accuracy(torch.eye(16), torch.eye(16).flip(0)) < 0.5
    # says yes to everything
    assert experts.sync_accuracy(torch.ones(16, 4), torch.ones(16, 4)) == 0.5
    video, audio = torch.eye(40), torch.eye(40)
    # one confused moment, which a second's mean outvotes
    audio[:, 5] += 3 * (torch.arange(40) == 20)
    assert experts.sync_accuracy(video, audio) < experts.sync_accuracy(video, audio, 20) == 1


def test_added_noise_is_as_far_below_the_speech_as_it_says():
    wave = np.sin(np.arange(16000) / 9).astype(np.float32)
    for exponent in (0, 1):
        noise = sampling.add_noise(wave, 10, np.random.default_rng(0), exponent) - wave
        assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.1)


def test_sync_expert_learns_which_feature_belongs_to_which_mouth():
    torch.manual_seed(0)
    net = experts.SyncXNet("small", audio_dim=8).train()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    history = []
    for _ in range(20):
        # one true and two false openings per row
        opening = torch.rand(16, 3)
        # [16, 1, 1, 40, 1] the mouth's height
        rows = torch.arange(40)[:, None] < 40 * opening[:, 0, None, None, None, None]
        pictures = rows.float().expand(16, 5, 3, 40, 80) * 0.8 + 0.1 * torch.rand(16, 5, 3, 40, 80)
        sound = (
            torch.cat([opening[..., None], 1 - opening[..., None]], -1)
            .repeat(1, 1, 4)[:, :, None]
            .expand(16, 3, 5, 8)
        )
        loss, accuracy = experts.sync_batch_loss(net, pictures, sound[:, 0], sound[:, 1:])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        history.append(loss.item())
    # ln 2 + ln 3 = 1.79 is the loss of one who guesses
    assert history[0] > 1.7 > 1.5 > np.mean(history[-5:])


def test_text_survives_encoding_in_any_language():
    for text in ("", "set blue at f two now", "你好，世界 日本語 é"):
        tokens = lipreader.encode_text(text)
        assert tokens[-1] == lipreader.EOS
        assert lipreader.decode_tokens(tokens + [lipreader.PAD] * 3) == text


@pytest.mark.parametrize("read, truth, rate",
                         [("kitten", "sitting", 3 / 7), ("", "abc", 1), ("abc", "abc", 0),
                          ("ab", "", 2)])
def test_character_error_rate_counts_edits_per_true_character(read, truth, rate):
    assert lipreader.character_error_rate(read, truth) == pytest.approx(rate)


@pytest.mark.parametrize("text, readable", (("", False), ("a" * 50, True), ("a" * 51, False)))
def test_a_text_has_at_most_a_byte_a_frame(text, readable):
    assert data.ClipInfo(pathlib.Path("a.npz"), "a.mp4", text, 50).readable() == readable


def test_a_true_text_is_compared_with_another_ones_or_with_none():
    reader, video = lipreader.LipReader().eval(), torch.rand(1, 10, 3, 64, 128)
    reader.requires_grad_(False)
    assert set(metrics.measure_reader(reader, video, "yes", [])) == {"cer"}
    assert set(metrics.measure_reader(reader, video, "yes", ["no"])) == {"cer", "reads"}


def test_lip_reader_never_looks_at_the_token_it_must_guess():
    net = lipreader.LipReader("small").eval()
    video, tokens = torch.rand(2, 9, 3, 40, 80), torch.randint(0, 256, (2, 6))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 256
    with torch.no_grad():
        changed = (net(video, tokens) - net(video, other)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 2


def test_lip_reader_ignores_the_padding_of_short_clips():
    net = lipreader.LipReader("small").eval()
    video, tokens = torch.rand(1, 9, 3, 40, 80), torch.randint(0, 256, (1, 4))
    padded = torch.cat([video, torch.rand(1, 5, 3, 40, 80)], 1)
    with torch.no_grad():
        assert torch.allclose(net(video, tokens), net(padded, tokens, torch.tensor([9])), atol=1e-4)
        assert torch.allclose(net.encode(video)[1], net.encode(padded, torch.tensor([9]))[1][:, :9],
                              atol=1e-4)


def test_gradient_of_the_lip_loss_reaches_every_frame_of_a_frozen_reader():
    net, video = (
        lipreader.LipReader("small").eval().requires_grad_(False),
        torch.rand(2, 8, 3, 128, 256, requires_grad=True),
    )
    losses.lip_reading_loss(net(video,
                                torch.tensor([[65, 66, lipreader.EOS],
                                              [67, lipreader.EOS, lipreader.PAD]])),
                            torch.tensor([[65, 66, lipreader.EOS],
                                          [67, lipreader.EOS, lipreader.PAD]]),
                            lipreader.PAD).backward()
    assert (video.grad.abs().sum((2, 3, 4)) > 0).all()


def test_lip_reader_learns_two_clips_by_heart_and_reads_them():
    net = lipreader.LipReader("small").train()
    video, texts = torch.rand(2, 12, 3, 40, 80), ["ab", "né"]
    tokens = torch.tensor([lipreader.encode_text(texts[0]) + [lipreader.PAD],
                           lipreader.encode_text(texts[1])])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(40):
        loss = lipreader.lip_batch_loss(net, video, tokens)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    net.eval()
    assert net.read(video) == texts
    own, foreign = (losses.lip_reading_loss(net(video, t), t, lipreader.PAD)
                    for t in (tokens, tokens.flip(0)))
    assert own < foreign


def test_experts_survive_a_checkpoint():
    for net in (experts.SyncXNet("small", "mel"), lipreader.LipReader("small")):
        again = experts.load_expert(experts.pack_expert(net))
        assert type(again) is type(net) and not again.training
        assert all(torch.equal(a, b) for a,
                   b in zip(net.state_dict().values(), again.state_dict().values()))
    assert experts.load_expert(experts.pack_expert(None)) is None


@pytest.fixture(scope="module")
def content():
    """A checkpoint as train.py writes it, of untrained networks."""
    sync, reader = experts.SyncXNet("small", audio_dim=D), lipreader.LipReader("small")
    encoder = ScratchEncoder(D)
    return {"version": common.VERSION, "kind": "lipsync", "config": dataclasses.asdict(CONV),
            "about": {}, "model": LipSync(CONV).state_dict(),
            "audio_encoder": {"dims": encoder.dims, "state": encoder.state_dict()},
            "sync": train.halved(experts.pack_expert(sync)), "lip": experts.pack_expert(reader)}


def test_a_sync_expert_that_hears_mel_fits_beside_an_audio_encoder_of_any_width(content, tmp_path):
    for audio_, fits in (("mel", True), ("features", False)):
        sync = experts.SyncXNet("small", audio_, audio_dim=D + 8)
        common.save_checkpoint(tmp_path / "w.pt", {**content, "sync": experts.pack_expert(sync)})
        if fits:
            assert experts.load_networks(tmp_path / "w.pt").sync.config["audio_dim"] == D + 8
        else:
            with pytest.raises(common.BadInput, match="takes sound of another width"):
                experts.load_networks(tmp_path / "w.pt")


def test_a_checkpoint_gives_all_networks_ready_to_use(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    networks = experts.load_networks(tmp_path / "w.pt")
    parts = (networks.net, networks.audio_encoder, networks.sync, networks.reader)
    assert not any(part.training for part in parts) and networks.net.config == CONV
    assert {p.dtype for p in networks.sync.parameters()} == {torch.float32}
    torch.save({**content, "sync": None, "lip": None}, tmp_path / "w.pt")
    networks = experts.load_networks(tmp_path / "w.pt")
    assert networks.sync is None and networks.reader is None


@pytest.mark.parametrize("change",
                         ({"version": None}, {"version": 1}, {"kind": "sync"},
                          {"config": {**dataclasses.asdict(CONV), "refs": -3}},
                          {"config": {"refz": 3}}, {"config": 7}, {"model": {}}, {"model": None},
                          {"sync": {"config": {"size": "huge"}, "state": {}}},
                          {"sync": {"config": {"size": "small"}, "state": {"x": 1}}}, {"lip": 3},
                          {"audio_encoder": None},
                          {"sync": experts.pack_expert(lipreader.LipReader("small"))},
                          {"sync": experts.pack_expert(experts.SyncXNet("small", audio_dim=D + 1))},
                          {"lip": experts.pack_expert(experts.SyncXNet("small"))}),
                         ids=lambda change: f"{next(iter(change))} {str(change)[:40]}")
def test_a_checkpoint_whose_parts_are_wrong_is_refused_in_one_line(change, content, tmp_path):
    torch.save(content | change, tmp_path / "w.pt")
    with pytest.raises(common.BadInput, match="w.pt: ") as caught:
        experts.load_networks(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_version_truncated_foreign_or_missing_is_refused(content, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({name: value for name, value in content.items() if name != "version"}, whole)
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("whole.pt", "half.pt", "text.pt", "list.pt", "none.pt"):
        with pytest.raises(common.BadInput, match=name):
            experts.load_networks(tmp_path / name)


def test_the_command_measures_a_silent_video_as_json_and_refuses_a_missing_one_in_one_line(
        content, demo, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    ffmpeg("-i", sorted(demo.glob("*.mp4"))[0], "-t", 1.2, "-af", "volume=0",
           tmp_path / "silence.mp4")
    words = ("--weights", tmp_path / "w.pt", "--device", "cpu")
    silence = command("experts.py", tmp_path / "silence.mp4", "--json", *words)
    assert silence.returncode == 0, silence.stderr
    assert "NaN" not in silence.stdout and "Infinity" not in silence.stdout
    result = json.loads(silence.stdout)
    assert result["frames"] == 30 and result["r_loudness"] is None and len(result["curve"]) == 31
    refused = command("experts.py", tmp_path / "none.mp4", *words)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("error: ")
    assert "none.mp4" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_corrupted_sound_keeps_its_length_range_and_timing():
    rng = np.random.default_rng(0)
    wave = np.zeros(16000, np.float32)
    wave[8000:8400] = np.sin(np.arange(400) / 5) * 0.3
    for _ in range(8):
        noisy = sampling.corrupt_sound(wave, rng)
        assert noisy.shape == wave.shape and noisy.dtype == np.float32 and np.abs(noisy).max() <= 1
        delays = [np.dot(noisy[8000 + d:8400 + d], wave[8000:8400]) for d in range(-300, 301)]
        assert abs(int(np.argmax(delays)) - 300) <= 2
    assert np.isfinite(sampling.corrupt_sound(np.zeros(1000, np.float32), rng)).all()


def test_jittered_pictures_stay_pictures_and_strength_zero_changes_nothing():
    pictures = torch.rand(2, 5, 3, 40, 80)
    jittered = lipreader.jitter_pictures(pictures)
    assert jittered.shape == pictures.shape
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert not torch.equal(jittered, pictures)
    assert torch.allclose(lipreader.jitter_pictures(pictures, 0.0), pictures, atol=1e-6)


# ---------------------------------------------------------------- data: the drawn corpus
@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A drawn corpus as `python data.py --demo` makes it: 6 clips of 3 speakers; with one more, it
    is prepared below."""
    folder = tmp_path_factory.mktemp("demo")
    result = command("data.py", "--demo", folder, "--clips", 6, "--speakers", 3, "--seed", 5)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def prepared(demo):
    """The same, prepared by `python data.py --data`."""
    result = command("data.py", "--data", demo)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"6 clips kept; [\d.]+ clips/s, [1-9]\d+ MiB a worker",
                     result.stdout), result.stdout + result.stderr
    return demo


def truth(video):
    return np.genfromtxt(video.with_suffix(".csv"), delimiter=",", names=True)


def test_drawn_speakers_speak_their_text_and_differ(demo):
    videos = sorted(demo.glob("*.mp4"))
    assert len(videos) == 6 and all(v.with_suffix(".txt").read_text().split() for v in videos)
    firsts = [next(media.read_frames(v)) for v in videos[::2]]
    assert all(f.shape == (720, 1280, 3) for f in firsts)
    assert min(np.abs(a.astype(int) - b).mean() for a, b in zip(firsts, firsts[1:])) > 5


def test_the_same_seed_draws_the_same_clip(tmp_path):
    for name in ("a", "b"):
        drawn.draw_clip(tmp_path / f"{name}.mp4", drawn.Speaker.draw(4), seed=9, seconds=0.4)
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    frames = [np.stack(list(media.read_frames(tmp_path / f"{name}.mp4"))) for name in ("a", "b")]
    assert np.array_equal(*frames)


def test_mediapipe_sees_the_drawn_mouth_open_and_close_as_the_truth_says(prepared):
    for info in data.list_clips(prepared):
        clip = data.load_clip(info.path)
        assert clip.found.mean() >= 0.99
        opening, width, _ = faces.mouth_shape(clip.landmarks).T
        assert np.corrcoef(opening, truth(prepared / clip.source)["opening"])[0, 1] >= 0.95
        assert np.corrcoef(width, truth(prepared / clip.source)["width"])[0, 1] >= 0.88


@pytest.mark.parametrize("yaw, pitch", [(-0.18, 0), (0.18, 0), (0, -0.1), (0, 0.1)])
def test_a_drawn_head_that_turns_moves_its_nose_and_keeps_its_outline(yaw, pitch):
    portrait = drawn.Portrait(drawn.Speaker.draw(2))
    ahead, turned = (drawn.render(portrait, (0, 1, 0, 0), (0, 0, 0, 1, *turn))
                     for turn in ((0, 0), (yaw, pitch)))
    nose_y = round(320 + portrait.speaker.nose_v * portrait.speaker.size)
    nose = ahead[nose_y - 30:nose_y + 20, 610:670]
    _, _, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(turned, nose, cv2.TM_CCOEFF_NORMED))
    moved = np.array([x - 610, y - (nose_y - 30)])
    assert np.abs(moved - 150 * np.array([yaw, pitch])).max() < 8 < np.abs(moved).max()
    assert np.array_equal(ahead[:, :450], turned[:, :450])
    assert np.array_equal(ahead[:, -450:], turned[:, -450:])


# ---------------------------------------------------------------- data: preparing
def test_clips_are_upright_crops_with_the_mouth_in_the_lower_half(prepared):
    for info in data.list_clips(prepared):
        clip = data.load_clip(info.path)
        assert (info.source, info.text, info.frames) == (clip.source, clip.text, len(clip))
        assert clip.landmarks.shape == (125, faces.K, 3)
        assert len(clip) == 125
        assert clip.frame(3).shape == (256, 256, 3)
        assert clip.mel.shape == (80, 500)
        assert len(clip.wave) == 80000
        assert clip.text == (prepared / clip.source).with_suffix(".txt").read_text().strip()
        assert (clip.landmarks[:, faces.LIPS_OUTER, 1] > 128).all()
        eyes = clip.landmarks[:, faces.EYE_CORNERS[1]] - clip.landmarks[:, faces.EYE_CORNERS[0]]
        assert np.degrees(np.abs(np.arctan2(eyes[:, 1], eyes[:, 0]))).max() < 4


def test_a_second_run_does_only_what_is_new(prepared):
    before = {info.path: info.path.stat().st_mtime_ns for info in data.list_clips(prepared)}
    assert data.prepare(prepared)["new"] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_clips_of_an_older_layout_are_made_again_and_that_is_said(demo, tmp_path, monkeypatch,
                                                                  capsys):
    ffmpeg("-i", sorted(demo.glob("*.mp4"))[0], "-t", 1.4, "-c", "copy", tmp_path / "a.mp4")
    data.prepare(tmp_path, 1)
    monkeypatch.setattr(data, "LAYOUT", data.LAYOUT + 1)
    capsys.readouterr()
    data.prepare(tmp_path, 1)
    assert "1 videos have clips of an older layout: they are made again" in capsys.readouterr().out


def test_two_shards_equal_one_run(prepared, tmp_path):
    for video in prepared.glob("*_000.*"):
        shutil.copy(video, tmp_path)
    kept = sum(data.prepare(tmp_path, 1, (i, 2))["kept"] for i in (1, 2))
    assert kept == 3
    for info in data.list_clips(tmp_path):
        again = data.load_clip(info.path)
        first = data.load_clip(prepared / ".clips" / info.path.name)
        assert np.array_equal(again.jpegs, first.jpegs) and np.array_equal(again.wave, first.wave)


def ffmpeg(*words):
    subprocess.run([media.ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, words)],
                   check=True)


def test_odd_videos_are_prepared_and_useless_ones_refused_with_their_reason(demo, tmp_path):
    source = sorted(demo.glob("*.mp4"))[0]
    sub = tmp_path / "sub folder" / "Ünï 'quoted' 名"
    sub.mkdir(parents=True)
    ffmpeg("-i", source, "-t", 2, "-r", "30000/1001", "-c:a", "libmp3lame", "-ar", 44100, "-ac", 2,
           sub / "fast %d.mkv")
    ffmpeg("-i", source, "-t", 1.5, "-vf", "scale=641:361", "-c:v", "mpeg4", "-q:v", 3,
           tmp_path / "odd size.avi")
    ffmpeg("-display_rotation", 90, "-i", source, "-t", 1.5, "-c", "copy", tmp_path / "rotated.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-an", "-c", "copy", tmp_path / "mute.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-af", "volume=0", "-c:v", "copy", tmp_path / "silent.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-vf", "scale=214:120", tmp_path / "small.mp4")
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=320x240:d=1.5", "-f", "lavfi", "-i", "sine=d=1.5",
           tmp_path / "faceless.mp4")
    ffmpeg("-i", source, "-t", 0.5, tmp_path / "short.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[:30_000])
    report = data.prepare(tmp_path)
    kept = sorted(info.source for info in data.list_clips(tmp_path))
    assert [pathlib.Path(k).name for k in kept if "rotated" not in k] == [
        "odd size.avi",
        "fast %d.mkv",
    ]
    refused = report["refused"]
    assert (
        refused["no sound track"]
        == refused["silent sound"]
        == refused["face smaller than 80 px"]
        == refused["shorter than 1 s"]
        == 1
    )
    assert refused["unreadable file"] == 2 and refused["face missing in > 10 % of frames"] >= 1


@pytest.mark.parametrize("rate",
                         (("-r", "30000/1001"),
                          ("-vf", r"select=lt(mod(n\,5)\,4)", "-fps_mode", "vfr")),
                         ids=("29.97", "variable"))
def test_sound_and_frames_stay_aligned_when_the_frame_rate_changes(rate, demo, tmp_path):
    source = sorted(demo.glob("*.mp4"))[1]
    ffmpeg("-i", source, *rate, "-c:a", "copy", tmp_path / "other.mkv")
    data.prepare(tmp_path, 1)
    clip, opening = data.load_clip(data.list_clips(tmp_path)[0].path), truth(source)["opening"]
    assert metrics.lag_of(faces.mouth_shape(clip.landmarks)[:, 0], opening[:len(clip)]) == 0
    sound = media.read_audio(source)[:len(clip.wave)]
    delays = [np.dot(clip.wave[8000 + d:40000 + d].astype(np.float64), sound[8000:40000])
              for d in range(-800, 801, 4)]
    assert abs(int(np.argmax(delays)) * 4 - 800) <= 640                 # one sample window: 40 ms


def test_a_killed_preparation_goes_on_where_it_was(demo, tmp_path):
    for i, source in enumerate(sorted(demo.glob("*.mp4"))[:3]):
        ffmpeg("-i", source, "-t", 1.4, "-c", "copy", tmp_path / f"{i}.mp4")
    process = subprocess.Popen([sys.executable, HERE / "data.py", "--data", tmp_path, "--workers",
                                "1"], start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list((tmp_path / ".clips").glob("*.json"))) >= 1:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {info.path: info.path.stat().st_mtime_ns for info in data.list_clips(tmp_path)}
    report = data.prepare(tmp_path, 1)
    assert report["kept"] == 3 and report["new"] < 3
    assert all(data.load_clip(info.path) for info in data.list_clips(tmp_path))
    assert any(p.stat().st_mtime_ns == t for p, t in finished.items())
    (tmp_path / "0.mp4").rename(tmp_path / "other.mp4")
    report = data.prepare(tmp_path, 1)
    assert (report["kept"], report["new"], report["orphans"]) == (3, 1, 1)


def test_yolo_boxes_are_decoded_and_doubles_suppressed():
    output = np.zeros((1, 20, 8400), np.float32)
    for anchor, row in ((5, (320, 200, 100, 80, 0.9)), (6, (322, 202, 100, 80, 0.8)),
                        (70, (100, 500, 40, 60, 0.7)), (9, (50, 50, 9, 9, 0.2))):
        output[0, :5, anchor] = row
    output[0, 5:8, 5] = (300, 190, 1)
    boxes, scores, points = faces.decode_yolo(output, scale=0.5, pad=(0, 140))
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert boxes[0].tolist() == pytest.approx([540, 40, 740, 200])
    assert boxes[1].tolist() == pytest.approx([160, 660, 240, 780])
    assert points[0, 0, :2].tolist() == pytest.approx([600, 100])


# ---------------------------------------------------------------- faces, data: references and sampl
def face(opening=0.0, width=0.0, count=1):
    """Some face: the first frame of the drawn geometry, mouth moved in px. -> float32 [count, K,
    3]"""
    rng = np.random.default_rng(1)
    points = rng.uniform(40, 216, (faces.K, 3))
    points[faces.UPPER, 1] = rng.uniform(20, 120, len(faces.UPPER))
    points[faces.EYE_CORNERS] = [(80, 90, 0), (176, 90, 0)]
    points[faces.MOUTH] = (128, 165, 0)
    points = np.repeat(points[None], count, 0)
    points[:, faces.GAP_ENDS[1], 1] += opening
    points[:, faces.MOUTH_CORNERS[0], 0] -= 30 + np.asarray(width) / 2
    points[:, faces.MOUTH_CORNERS[1], 0] += 30 + np.asarray(width) / 2
    return points.astype(np.float32)


def test_references_are_the_most_closed_mouth_then_open_spread_and_rounded_ones():
    opening, width = np.full(100, 2.0), np.zeros(100)
    opening[20:25], opening[40:45], width[60:65], width[80:85] = 0, 25, 20, -20
    points = face(opening, width, 100)
    chosen = faces.select_references(points, 4)
    assert [int(frame) // 20 for frame in chosen] == [
        1,
        *sorted({2, 3, 4}, key=[*chosen[1:] // 20].index),
    ]
    assert np.array_equal(chosen, faces.select_references(points, 4))
    for seed in range(30):
        some = faces.select_references(points, 3, exclude=np.arange(44, 56),
                                       rng=np.random.default_rng(seed))
        assert ((some < 40) | (some >= 60)).all()
    one = faces.select_references(points[:1], 3)
    assert one.tolist() == [0, 0, 0]


def test_a_turned_or_moving_head_is_no_reference_where_the_same_mouth_is_seen_frontal_and_still():
    opening = np.zeros(60)
    opening[10:20] = opening[30:40] = 20
    points = face(opening, 0, 60)
    points[30:40, faces.NOSE_TIP, 0] += 30         # looks aside
    assert 10 <= faces.select_references(points, 2)[1] < 20
    points = face(opening, 0, 60)
    points[30:40, :, 0] += 8 * (np.arange(10)[:, None] % 2)          # shakes
    assert 10 <= faces.select_references(points, 2)[1] < 20


def test_the_head_pose_brings_turned_points_back_to_a_hundredth_of_a_pixel():
    reference = np.random.default_rng(0).uniform(0, 256, (4, faces.K, 3)).astype(np.float32)
    turns = [cv2.Rodrigues(np.float64(axis))[0]
             for axis in ((0.4, 0, 0), (0, -0.5, 0.1), (0.1, 0.2, 0.3), (0, 0, 2.0))]
    frame = np.stack([1.1 * points @ turn.T + (5, -7, 3) for points, turn in zip(reference, turns)])
    open_mouth = frame.copy()
    open_mouth[:, faces.MOUTH] += 30               # what the mouth does must not matter
    moved = faces.with_head_pose(reference, open_mouth)
    assert moved.shape == frame.shape and np.abs(moved - frame).max() < 0.01
    frame[1, faces.UPPER[0]] = np.nan
    missing = faces.with_head_pose(reference, frame)
    assert np.isnan(missing[1]).all() and np.isfinite(missing[[0, 2, 3]]).all()


def test_a_reference_with_the_frames_head_pose_lies_on_the_drawn_face(prepared):
    errors = []
    for info in data.list_clips(prepared):
        points = data.load_clip(info.path).landmarks
        moved = faces.with_head_pose(points[:1], points)
        errors.append([np.linalg.norm((there - points)[:, faces.JAW, :2], axis=-1).mean()
                       for there in (points[:1], moved)])
    plain, posed = np.mean(errors, 0)
    assert posed < 0.7 * plain, (plain, posed)


def test_points_are_where_each_reference_lies_and_where_the_frames_head_pose_puts_it():
    rng = np.random.default_rng(2)
    references, frames = (rng.uniform(0, 256, (n, faces.K, 3)).astype(np.float32) for n in (R, S))
    points = faces.place_points(references, frames)
    assert points.shape == (S, R, 2, faces.K, 2)
    assert np.allclose(points[2, :, 0], references[..., :2] / 256, atol=1e-6)
    assert np.allclose(points[1, 3, 1], faces.with_head_pose(references[3], frames[1])[:, :2] / 256,
                       atol=1e-6)


def test_mirrored_points_lie_on_the_mirrored_picture_and_keep_their_names():
    points = sampling.mirror(face())
    right, left = points[0, faces.MOUTH_CORNERS]
    assert right[0] < left[0] and np.allclose(sampling.mirror(points), face(), atol=1e-4)


def test_bent_pictures_carry_their_points_along():
    picture = np.zeros((1, 256, 256, 3), np.uint8)
    points = np.zeros((1, 2, 3), np.float32)
    points[0, :, :2] = (100, 140), (160, 190)
    for x, y, _ in points[0].astype(int):
        cv2.circle(picture[0], (int(x), int(y)), 3, (255, 255, 255), -1)
    for seed in range(5):
        bent, moved = sampling.bend(picture, points, np.random.default_rng(seed))
        assert np.abs(moved - points).max() > 0.5
        for x, y, _ in moved[0]:
            window = bent[0, int(y) - 9:int(y) + 10, int(x) - 9:int(x) + 10, 1].astype(float)
            rows, columns = np.mgrid[:19, :19]
            centre = np.array([(columns * window).sum(), (rows * window).sum()]) / window.sum()
            assert np.abs(centre + (int(x) - 9, int(y) - 9) - (x, y)).max() < 1


TINY = lipsync.PRESETS["tiny"]


def test_a_sample_depends_on_seed_and_number_only_and_has_the_documented_shapes(prepared):
    make = lambda seed=0: sampling.ClipDataset(data.list_clips(prepared), TINY, group=S, seed=seed,
                                               sync_audio="mel")
    first, again, other = make()[7], make()[7], make(1)[7]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["target"], other["target"])
    assert first["refs"].shape == (3, 3, 256, 256)
    assert first["target"].shape == (S, 3, 256, 256)
    assert first["target"].dtype == torch.uint8
    assert first["points"].shape == (S, 3, 2, faces.K, 2)
    assert first["lips"].shape == (S, len(faces.MOUTH), 2)
    assert first["mel"].shape == (80, 500)
    assert first["window"].shape == (S, 11)
    assert first["sync_sound"].shape == (80, 4 * S)
    assert first["mouth_box"].shape == (S, 4) and first["amplitude"].shape == (S,)


def test_the_mouth_stages_target_is_the_true_mouth_scaled_about_the_closed_one(prepared):
    samples = sampling.MouthSamples(data.list_clips(prepared), TINY, None, amplitude_share=1.0)
    batch, again = samples.batch(3, clips=2, frames=4), samples.batch(3, clips=2, frames=4)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["points"].shape == (8, 3, 2, faces.K, 2)
    assert batch["mel"].shape == (2, 80, 500)
    assert batch["window"].shape == (2, 4, 11)
    plain = sampling.MouthSamples(data.list_clips(prepared), TINY, None,
                                  amplitude_share=0.0).batch(3, clips=2, frames=4)
    assert (plain["amplitude"] == 1).all()
    shown = sampling.MouthSamples(data.list_clips(prepared), TINY, None, amplitude_share=1.0,
                                  quiet_share=1.0, silent_share=0.0)
    clip = data.load_clip(data.list_clips(prepared)[0].path)
    row = shown.rows(clip.landmarks, clip.mel, None, sampling.loudness(clip), 6,
                     np.random.default_rng(0))
    closed, a = row["points"][:, 0, 1, faces.MOUTH], row["amplitude"][:, None, None]
    true = closed + (row["lips"] - closed) / a
    everything = (
        np.concatenate([clip.landmarks, sampling.mirror(clip.landmarks)])[:, faces.MOUTH, :2] / 256
    )
    nearest = np.abs(everything[None] - true[:, None]).max((2, 3)).min(1)
    assert nearest.max() < 1e-4 and not np.allclose(a, 1)


def test_folders_are_drawn_by_the_square_root_of_their_videos_and_people_alike():
    info = lambda source: data.ClipInfo(pathlib.Path("x"), source, "", 125)
    infos = [info(f"many/{i}.mp4")
             for i
             in range(16)] + [info("one/a.mp4")] * 3 + [info("one/b.mp4")] + [info("few/c.mp4")]
    chances = sampling.draw_chances(infos)
    assert chances[:16].sum() == pytest.approx(4 / (4 + 2 ** 0.5 + 1))
    assert chances.sum() == pytest.approx(1)
    assert chances[16:19].sum() == pytest.approx(chances[19])


def test_references_of_a_training_sample_are_at_least_five_frames_from_its_targets(prepared,
                                                                                   monkeypatch):
    seen = []
    real = faces.select_references
    monkeypatch.setattr(faces, "select_references", lambda *a,
                        **k: seen.append((k["exclude"], real(*a, **k))) or seen[-1][1])
    samples = sampling.ClipDataset(data.list_clips(prepared), TINY, group=S, amplitude_share=0)
    for i in range(10):
        start = int(samples[i]["start"])
        targets, refs = seen[-1]
        assert targets.tolist() == list(range(start, start + S))
        assert np.abs(refs[:, None] - targets).min() >= 5


def test_before_the_sync_loss_enters_the_frames_of_a_group_are_spread(prepared):
    samples = sampling.ClipDataset(data.list_clips(prepared), TINY, group=S, amplitude_share=0,
                                   spread_until=20)
    assert not any(samples[i]["in_sync"] for i in range(20))
    assert all(samples[i]["in_sync"] for i in range(20, 26))
    # F = 11: 5 is the frame itself
    gaps = [int(samples[i]["window"][1, 5] - samples[i]["window"][0, 5])
            for i in (*range(20), *range(20, 26))]
    assert max(gaps[:20]) > 10 and gaps[20:] == [1] * 6


def test_the_amplitude_coefficient_of_a_sample_is_how_much_wider_the_shown_mouth_is(prepared):
    clip = data.load_clip(data.list_clips(prepared)[0].path)
    gap = faces.mouth_shape(clip.landmarks)[:, 0]
    wide = np.flatnonzero(gap > 5)
    for seed in range(10):
        heard = wide[seed:seed + 5]
        shown, a = sampling.pair_amplitude(clip, heard, np.random.default_rng(seed))
        assert a == pytest.approx((gap[shown] / gap[heard]).clip(0.3, 2), rel=1e-4)


def test_sync_negatives_never_share_a_frame_with_the_positive(prepared):
    clips = data.list_clips(prepared)
    samples = sampling.SyncDataset(clips, TINY, group=5, sync_audio="mel")
    clip_mels = {i: data.load_clip(info.path).mel.astype(np.float32) for i,
                 info in enumerate(clips)}
    checked = 0
    for number in range(12):
        sample = samples[number]
        mel = clip_mels[int(sample["clip"])]
        find = lambda part: [t
                             for t in range(0, 121)
                             if np.array_equal(mel[:, 4 * t:4 * t + 20], part.numpy())]
        here = find(sample["sound"])
        if here:                                  # the clean half of the samples
            checked += 1
            assert all(min(abs(t - here[0]) for t in find(w)) >= 5 for w in sample["negatives"])
    assert checked
    batch = dict(sound=torch.arange(4.0)[:, None], negatives=-torch.ones(4, 2, 1),
                 clip=torch.tensor([0, 0, 1, 2]))
    assert train.all_negatives(batch)[:, 2:, 0].tolist() == [[3, 2], [-1, 3], [1, 0], [2, 1]]


def test_a_sound_that_is_late_is_moved_to_its_pictures(prepared):
    series = np.arange(6.0)[:, None]
    assert sampling.at_time(series, 2)[:, 0].tolist() == [2, 3, 4, 5, 5, 5]
    assert sampling.at_time(series, -1)[:, 0].tolist() == [0, 0, 1, 2, 3, 4]
    clips = data.list_clips(prepared)[:1]
    source, plain = clips[0].source, sampling.ClipDataset(clips, TINY, group=S)
    moved = sampling.ClipDataset(clips, TINY, group=S, offsets={source: 2})
    for i in range(4):
        start = int(plain[i]["start"])
        mel = data.load_clip(clips[0].path).mel.astype(np.float32)
        late = np.minimum(np.arange(4 * start, 4 * (start + S)) + 8, mel.shape[1] - 1)
        assert torch.equal(moved[i]["target"], plain[i]["target"])
        assert np.array_equal(moved[i]["sync_sound"].numpy(), mel[:, late])


def test_the_sync_expert_too_learns_from_moved_sounds(prepared):
    clips = data.list_clips(prepared)[:1]
    clip, source = data.load_clip(clips[0].path), clips[0].source
    moved, choose = sampling.at_time(clip.mel.T, 8), np.random.default_rng  # two frames of sound
    samples = sampling.SyncDataset(clips, TINY, group=S, sync_audio="mel")
    shifted = sampling.SyncDataset(clips, TINY, group=S, sync_audio="mel",
                                   offsets={source: 2})
    noisy = 0
    for seed in range(8):  # half of them noisy
        _, here = samples.load(clips[0], choose(seed))
        _, late = shifted.load(clips[0], choose(seed))
        assert np.array_equal(late, sampling.at_time(here, 8))
        noisy += not np.array_equal(here, clip.mel.T)
    assert 0 < noisy < 8
    pieces = [shifted[i]["sound"].numpy().T for i in range(8)]
    rows = np.lib.stride_tricks.sliding_window_view(moved.astype(np.float32), 4 * S, 0)
    found = [np.abs(rows.swapaxes(1, 2) - piece).max((1, 2)).min() == 0 for piece in pieces]
    assert any(found)


def test_the_mouth_too_learns_from_moved_sounds(prepared):
    infos = data.list_clips(prepared)[:2]
    clip = data.load_clip(infos[0].path)
    samples = sampling.MouthSamples(infos, TINY, None)
    samples.move_sounds({infos[0].source: 2})
    moved, loud = samples.clips[0].mel, sampling.loudness(clip)
    assert np.array_equal(moved, sampling.at_time(clip.mel.T, 8).T)
    assert np.array_equal(samples.clips[0].loudness, sampling.at_time(loud, 2))
    assert np.array_equal(samples.clips[0].landmarks, clip.landmarks)


def test_digital_silence_closes_the_mouth_that_is_taught(prepared):
    infos = data.list_clips(prepared)
    samples = sampling.MouthSamples(infos, TINY, None, silent_share=1.0, amplitude_share=0)
    batch = samples.batch(0, clips=4)
    gap = faces.mouth_shape(with_lips(batch["lips"]))[:, 0]
    talking = sampling.MouthSamples(infos, TINY, None, silent_share=0.0, amplitude_share=0)
    wide = faces.mouth_shape(with_lips(talking.batch(0, clips=4)["lips"]))[:, 0]
    assert float(np.max(gap)) < 3 < float(np.mean(wide))
    floor = audio.log_mel(np.zeros(16_000))[:, 0]
    assert torch.allclose(batch["mel"], floor[:, None].expand_as(batch["mel"]))


def with_lips(lips):
    """[B, P, 2] picture widths -> landmarks [B, K, 3] crop px whose mouth is that"""
    landmarks = np.zeros((len(lips), faces.K, 3), np.float32)
    landmarks[:, faces.MOUTH, :2] = np.asarray(lips) * faces.CROP_PX
    return landmarks


def test_a_broken_clip_file_is_named_once_and_skipped(prepared, tmp_path, capsys):
    infos = [dataclasses.replace(info, path=pathlib.Path(shutil.copy(info.path, tmp_path)))
             for info in data.list_clips(prepared)[:2]]
    samples = sampling.ClipDataset(infos, TINY, group=S)
    infos[0].path.write_bytes(infos[0].path.read_bytes()[:1000])
    for i in range(8):
        assert samples[i]["clip"] == 1
    printed = capsys.readouterr().out
    assert printed.count("skipped from now on") == 1 and infos[0].path.name in printed
    sentences = sampling.SentenceDataset(infos)
    assert all(sentences[i][2] == 1 for i in range(8)) and data.load_or_skip(infos[0].path) is None
    assert len(sampling.MouthSamples(infos, TINY, None).clips) == 1


def damaged(info, folder, **arrays):
    """A clip's copy that can be loaded, but with other arrays in it"""
    path = folder / info.path.name
    with np.load(info.path) as file:
        np.savez(path, **{**file, **arrays})
    return dataclasses.replace(info, path=path)


def test_whatever_goes_wrong_while_a_sample_is_made_names_the_clip_in_one_line(prepared, tmp_path):
    info = data.list_clips(prepared)[0]
    clip = damaged(info, tmp_path, jpegs=np.zeros(10**7, np.uint8))
    for samples in (sampling.ClipDataset([clip], TINY), sampling.SyncDataset([clip], TINY),
                    sampling.SentenceDataset([clip])):
        with pytest.raises(common.BadInput, match=rf"^{clip.path}: frame \d+ is no picture$"):
            samples[0]
    unnamed = rf"^{clip.path}: cannot be used \(\w+: .+\)$"  # an error that knows nothing of files
    damaged(info, tmp_path, jpegs=np.zeros(0, np.uint8))
    keeper = loop.Keeper(bare_run(tmp_path), "sync", {}, 5, 1, {"kind": "sync"})
    loader = torch.utils.data.DataLoader(sampling.SyncDataset([clip], TINY), num_workers=1)
    with pytest.raises(common.BadInput, match=unnamed):
        next(keeper.steps(loader))
    damaged(info, tmp_path, landmarks=np.zeros((125, 3, 3), np.float32))
    for sample in (sampling.ClipDataset([clip], TINY).__getitem__,
                   sampling.MouthSamples([clip], TINY, None).batch):
        with pytest.raises(common.BadInput, match=unnamed):
            sample(0)


def test_clips_made_with_more_options_stay_and_a_single_video_still_holds_out_its_end(prepared):
    assert data.up_to_date([4, 9, "a", "yolo", None], [4, 9, "a", None, None])
    assert not data.up_to_date([4, 9, "a", None, None], [4, 9, "a", "yolo", None])
    assert not data.up_to_date([4, 8, "a", None, None], [4, 9, "a", None, None])
    assert not data.up_to_date([], [4, 9, "a", None, None])
    one = [info for info in data.list_clips(prepared) if info.source.startswith("speaker000")]
    assert data.split_clips(one) == (one[:-1], one[-1:]) and data.split_clips(one, "*") == ([], one)


def test_videos_in_linked_folders_are_found_once_and_hidden_ones_not(tmp_path):
    (tmp_path / "a" / ".clips").mkdir(parents=True)
    for name in ("a/x y.MP4", "a/.z.mp4", "a/.clips/w.mp4", "a/n.txt"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "a")
    assert data.list_videos(tmp_path / "data") == [tmp_path / "data" / "link" / "x y.MP4"]


def test_held_out_videos_stay_held_out_when_others_come(prepared):
    sources = [f"folder/{i}.mp4" for i in range(2000)]
    share = np.mean([data.is_held_out(s) for s in sources])
    assert 0.07 < share < 0.13 and data.is_held_out("a/x.mp4") == data.is_held_out("b/x.mp4")
    _, held = data.split_clips(data.list_clips(prepared), "speaker001*")
    assert {info.source[:10] for info in held} == {"speaker001"}


# ---------------------------------------------------------------- training
FLAGS = ("--preset", "tiny", "--batch", 2, "--group", 5, "--workers", 0, "--perceptual-weight", 0,
         "--device", "cpu", "--held-out", "speaker002*", "--sample-steps", 1000)


def training(prepared, out, *more, **options):
    return command("train.py", "--data", prepared, "--out", out, *FLAGS, *more, **options)


def open_run(prepared, out, trained=None, **more):
    """A Run of a few small steps; with `trained` it finds that run's experts and mouth."""
    base = dict(data=str(prepared), out=str(out), preset="tiny", batch=4, group=5, workers=0,
                perceptual_weight=0.0, gan_weight=0.0, sync_weight=0.0, lip_weight=0.0,
                device="cpu", held_out="speaker002*", steps=10, mouth_steps=9, sample_steps=1000)
    pathlib.Path(out).mkdir(exist_ok=True)
    for name in ("mouth.pt", "sync.pt", "lip.pt") if trained else ():
        shutil.copy(trained / name, out)
    return train.open_run(options.TrainConfig(**{**base, **more}))


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A run of all stages, a few steps each, through the command."""
    out = tmp_path_factory.mktemp("runs") / "all"
    result = training(prepared, out, "--sync-steps", 3, "--lip-steps", 3, "--mouth-steps", 9,
                      "--steps", 4, "--sync-start", 0, "--gan-start", 0.5, "--eval-clips", 1,
                      "--min-sync-accuracy", 0)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_one_command_trains_all_stages_and_leaves_a_checkpoint_that_dubs(trained, demo, tmp_path):
    out, printed = trained
    assert {"config.json", "log.csv", "curves.png", "sync.pt", "lip.pt", "mouth.pt", "offsets.json",
            "generator.pt", "weights.pt", "eval.json"} <= {p.name for p in out.iterdir()}
    assert re.search(
        r"^speed +gmac .* all +threads\nnetwork +0\.\d+ .*\nfull +15\..*\nedge +0\.7.*\ntiny +0\.3",
        printed,
        re.M,
    ), printed
    assert list((out / "samples").glob("*.png"))
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [r["stage"] for r in rows] == ["sync", "lip", "mouth", "generator"]
    assert all(rows[-1][k]
               for k
               in ("total", "reconstruction", "sync", "lip", "gan", "discriminator", "lr",
                   "grad_norm", "frames_per_s"))
    table = json.loads(printed.strip().splitlines()[-1])
    real = table["."]["real"]
    assert real["psnr"] > 60
    assert real["ssim"] == pytest.approx(1)
    assert real["sharpness"] == pytest.approx(1)
    assert real["r"] > 0.95
    assert real["lag"] == 0
    assert real["seam"] == 0
    assert {"r", "r_best", "r_width", "r_rounding", "error", "deviation", "silence", "amp_0.5",
            "amp_1.5"} <= set(table["."]["lips"])
    assert {"model", "copy", "silence", "amplitude 0.5", "amplitude 1.5"} <= set(table["."])
    assert table["."]["true lips"]["lmd"] < table["."]["model"]["lmd"]
    assert (out / "strip_videos.png").is_file()
    assert list(table["speed"]) == ["network", *lipsync.PRESETS]
    assert all(set(row) == set(evaluate.COLUMNS["speed"]) for row in table["speed"].values())
    assert cv2.imread(str(out / "strip_videos.png")).shape == (5 * 256, 10 * 256, 3)
    assert set(table["."]["experts"]) == {"clips", "accuracy", "accuracy_10db", "accuracy_1s",
                                          "accuracy_1s_10db", "shift", "cer", "reads"}
    assert "accuracy_10db" in printed
    videos = sorted(demo.glob("*.mp4"))
    result = command("infer.py", videos[0], videos[-1], "--weights", out / "weights.pt", "--out",
                     tmp_path / "x.mp4")
    assert result.returncode == 0 and "offset" in result.stdout, result.stderr
    result = command("experts.py", tmp_path / "x.mp4", "--weights", out / "weights.pt", "--json")
    measured = json.loads(result.stdout)
    assert {"offset", "confidence", "distance", "text", "frames_with_face",
            "r_loudness"} <= set(measured)
    assert measured["frames"] == 125


def test_a_finished_stage_is_not_done_again_and_one_planned_for_other_steps_is_named(trained,
                                                                                     prepared,
                                                                                     tmp_path):
    run = open_run(prepared, tmp_path, trained[0], sync_steps=3, lip_steps=4)
    assert loop.is_finished(run, "sync") and not loop.is_finished(run, "generator")
    with pytest.raises(common.BadInput, match="was planned for 3 steps.*not 4"):
        loop.is_finished(run, "lip")
    before = (tmp_path / "sync.pt").read_bytes()
    result = training(prepared, tmp_path, "--stage", "sync", "--sync-steps", 5)
    assert result.returncode == 2
    assert "planned for 3" in result.stderr
    assert (tmp_path / "sync.pt").read_bytes() == before
    assert "done already" in training(prepared, tmp_path, "--stage", "sync", "--sync-steps",
                                      3).stdout


def test_an_expert_learns_on_from_the_one_inside_weights_of_the_same_shape(prepared, tmp_path):
    run = open_run(prepared, tmp_path)
    old = experts.SyncXNet("small", audio_dim=D)
    run.start = {"sync": experts.pack_expert(old)}
    begun = loop.begin_expert(run, "sync", experts.SyncXNet("small", audio_dim=D))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), begun.parameters()))
    other = experts.SyncXNet("small", audio_dim=D + 1)
    assert loop.begin_expert(run, "sync", other) is other
    reader = lipreader.LipReader("small")
    assert loop.begin_expert(run, "lip", reader) is reader  # there is none inside


def test_frozen_experts_and_lips_do_not_change_by_a_single_bit(trained, prepared, tmp_path,
                                                               monkeypatch):
    run = open_run(prepared, tmp_path, trained[0], batch=1, steps=12, sync_weight=0.03,
                   lip_weight=0.001, sync_start=0.0, min_sync_accuracy=0.0, gan_weight=0.03,
                   gan_start=0.0)
    nets, original = [], train.load_experts
    monkeypatch.setattr(train, "load_experts", lambda r: nets.append(original(r)) or nets[-1])
    assert train.train_generator(run)
    for net, fresh in zip(nets[-1], original(run)):
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
    made = common.load_checkpoint(tmp_path / "generator.pt")["state"]["net"]
    mouth = common.load_checkpoint(tmp_path / "mouth.pt", "mouth")["state"]
    assert all(torch.equal(v, made[f"lip_head.{k}"]) for k, v in mouth["lip_head"].items())
    assert torch.equal(mouth["fusion"]["adapter.0.weight"], made["fusion.adapter.0.weight"])


def test_accumulated_gradients_are_those_of_the_big_batch(trained, prepared, tmp_path, monkeypatch):
    import contextlib
    # float32
    monkeypatch.setattr(common, "autocast", lambda device: contextlib.nullcontext())
    # the lips' noise differs by batch
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    gradients = []
    monkeypatch.setattr(train, "update", lambda run, optimizer, *rest,
                        **more: gradients.append([p.grad.clone()
                                                  for p in optimizer.param_groups[0]["params"]])
                        or 0.0)
    for micro in (0, 3):                          # 4 groups in one, or 3 and 1
        assert train.train_generator(open_run(prepared, tmp_path / str(micro), trained[0],
                                              micro=micro, group=2, steps=1))
    assert len(gradients[0]) > 30
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_two_processes_train_one_and_the_same_network_through_all_stages(prepared, tmp_path):
    script = tmp_path / "sums.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, common, loop, options, train
def checked(share):
    def check(self):
        share(self)
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                total = sum(v.double().sum() for v in part.state_dict().values()).reshape(1)
                both = [torch.zeros_like(total) for _ in range(2)]
                torch.distributed.all_gather(both, total)
                assert both[0].item() == both[1].item(), (self.name, name, both)
                if self.step == self.planned:
                    # in one piece: two processes write
                    sys.stdout.write(f"{{self.name}} {{name}} equal\\n")
    return check
loop.Keeper.share = checked(loop.Keeper.share)
common.cli(train.main)
""")
    words = ("--data", prepared, "--out", tmp_path / "run", *FLAGS, "--sync-steps", 2,
             "--lip-steps", 2, "--mouth-steps", 3, "--steps", 2, "--eval-clips", 1, "--sync-start",
             0, "--gan-start", 0, "--min-sync-accuracy", 0)
    result = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533",
                     script, *words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    for line in ("sync net equal", "lip net equal", "mouth lip_head equal", "generator net equal",
                 "generator discriminator equal"):
        assert result.stdout.count(line) == 2, result.stdout


def test_two_processes_get_the_gradients_of_one_with_the_joint_batch(trained, prepared, tmp_path):
    shutil.copy(trained[0] / "mouth.pt", tmp_path)
    script = tmp_path / "gradients.py"
    script.write_text(f"""
import contextlib, os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, common, loop, options, train
common.autocast = lambda device: contextlib.nullcontext()           # float32
torch.randn_like = torch.zeros_like                                  # no noise on the lips
world = int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    torch.distributed.init_process_group("gloo")
config = options.TrainConfig(data={str(prepared)!r}, out={str(tmp_path)!r}, preset="tiny",
                           batch=4 // world, group=2, workers=0, steps=1, perceptual_weight=0,
                           gan_weight=0, sync_weight=0, lip_weight=0, device="cpu",
                           held_out="speaker002*", sample_steps=9)
run = train.open_run(config)
def catch(parameters, limit):
    torch.save([p.grad for p in parameters], f"{tmp_path}/{{world}}.{{run.rank}}.pt")
    return torch.zeros(())
torch.nn.utils.clip_grad_norm_ = catch
train.train_generator(run)
""")
    for launcher in ([],
                     ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29534"]):
        (tmp_path / "generator.pt").unlink(missing_ok=True)
        result = command(*launcher, script, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1.0", "2.0", "2.1"))
    assert len(one) > 30 and max(g.abs().max() for g in one) > 1e-4
    for a, b, c in zip(one, first, second):
        assert torch.equal(b, c) and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("stage, kind", (("sync", "sync"), ("generator", "lipsync")))
def test_a_killed_run_resumes_bit_for_bit(stage, kind, trained, prepared, tmp_path):
    more = ("--stage", stage, "--steps", 6, "--sync-steps", 6, "--gan-start", 0.3, "--lip-weight",
            0, "--sync-weight", 0)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        shutil.copy(trained[0] / "mouth.pt", tmp_path / name)
    assert training(prepared, tmp_path / "whole", *more).returncode == 0
    words = [sys.executable, HERE / "train.py", "--data", prepared, "--out", tmp_path / "killed",
             *FLAGS, *more, "--save-minutes", 0]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / f"{stage}.pt"
    while process.poll() is None and not (file.is_file()
                                          and common.load_checkpoint(file, kind)["step"] >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= common.load_checkpoint(file, kind)["step"] < 6
    # what is there is not overwritten by mistake
    stopped = training(prepared, tmp_path / "killed", *more)
    assert stopped.returncode == 2 and "--resume goes on" in stopped.stderr
    other = training(prepared, tmp_path / "killed", *more, "--resume", "--lr", 0.5)
    assert other.returncode == 2
    assert "--lr 0.5: the run in" in other.stderr
    assert "begun with 0.001" in other.stderr
    # the flags are known
    assert command("train.py", "--out", tmp_path / "killed", "--resume").returncode == 0
    whole, resumed = (common.load_checkpoint(tmp_path / name / file.name, kind)["state"]
                      for name in ("whole", "killed"))
    for part in ("net", "discriminator", "audio") if stage == "generator" else ("net",):
        assert all(torch.equal(v, resumed[part][k]) for k, v in whole[part].items()), part


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_and_its_loader_stops_it_between_two_steps_and_saves(sent, prepared,
                                                                               tmp_path):
    words = [sys.executable, HERE / "train.py", "--data", prepared, "--out", tmp_path, *FLAGS,
             "--workers", 1, "--stage", "sync", "--sync-steps", 5000]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = tmp_path / "log.csv"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; " in printed and "Traceback" not in errors, errors
    assert 20 <= common.load_checkpoint(tmp_path / "sync.pt", "sync")["step"] < 5000


def test_a_signal_to_one_process_of_two_stops_both_and_one_says_that_it_saved(prepared, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import common, loop, train
note = loop.Keeper.log
def log(self, *rest):
    note(self, *rest)
    if self.run.rank == 1 and self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
loop.Keeper.log = log
common.cli(train.main)
""")
    words = ("--data", prepared, "--out", tmp_path / "run", *FLAGS, "--batch", 1, "--stage", "sync",
             "--sync-steps", 500)
    result = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29535",
                     script, *words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("stopped; ") == 1, result.stdout + result.stderr[-3000:]
    assert common.load_checkpoint(tmp_path / "run" / "sync.pt", "sync")["step"] == 3


def test_the_rate_is_never_zero_and_rises_to_the_full_one_before_it_falls():
    for warmup in (0, 0.1):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        scheduler, rates = loop.warm_cosine(optimizer, 40, warmup), []
        for _ in range(40):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        top = int(np.argmax(rates))
        assert rates[0] > 0 and max(rates) == pytest.approx(1) and top == round(40 * warmup)
        assert (np.diff(rates[:top + 1]) > 0).all() and (np.diff(rates[top:]) < 0).all()


def test_a_preset_sets_defaults_and_a_flag_overrides_them():
    parse = lambda *words: options.parse_flags(["--data", "x", *words])
    assert parse() == options.TrainConfig(data="x", **options.TRAINING["edge"])
    assert parse("--preset", "full") == options.TrainConfig(data="x", preset="full")
    tiny = parse("--preset", "tiny", "--steps", "7")
    assert tiny.steps == 7 and tiny.sync_steps == options.TRAINING["tiny"]["sync_steps"]


def test_bad_settings_are_one_line_and_exit_2(prepared, tmp_path, demo):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for words, part in (((tmp_path / "none", tmp_path / "o"), "no such folder"),
                        ((tmp_path / "empty", tmp_path / "o"), "no video"),
                        ((prepared, tmp_path / "file"), "file"),
                        ((prepared, tmp_path / "o", "--preset", "huge"), "--preset huge"),
                        ((prepared, tmp_path / "o", "--stage", "x"), "--stage x"),
                        ((prepared, tmp_path / "o", "--perceptual-weight", 0.01, "--vgg",
                          tmp_path / "file"), "not VGG-19"),
                        ((prepared, tmp_path / "o", "--batch", 0), "--batch"),
                        ((prepared, tmp_path / "o", "--stage", "generator", "--weights",
                          tmp_path / "file"), "file"),
                        ((prepared, tmp_path / "o", "--audio-encoder", tmp_path / "file"),
                         "--audio-encoder scratch")):
        result = training(*words)
        assert result.returncode == 2, result.stderr
        assert part in result.stderr, result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("words, part",
                         (((), "--data DIR is missing"),
                          (("--gan", "wgan"), "--gan wgan: choose from"),
                          (("--micro", "-1"), "--micro -1"), (("--refs", "9"), "refs: 1..8"),
                          (("--expert-size", "big"), "--expert-size big"),
                          (("--seed", "-1"), "--seed -1"), (("--lr", "nan"), "--lr nan"),
                          (("--sync-weight", "inf"), "--sync-weight inf")))
def test_a_wrong_flag_is_told_before_the_work(words, part, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv",
                        ["train.py", "--out", str(tmp_path),
                         *(("--data", str(prepared)) if words else ()), "--preset", "tiny", *words])
    with pytest.raises(common.BadInput, match=part):
        train.main()


def bare_run(out, **more):
    """A Run without clips or networks, for what needs neither."""
    config = options.TrainConfig(data="x", out=str(out), preset="tiny", **more)
    return loop.Run(config, out, 0, 1, torch.device("cpu"), [], [], lipsync.PRESETS["tiny"],
                     ScratchEncoder(96), None)


@pytest.mark.parametrize("step, planned, part",
                         (("x", 20, "step x of 20"), (-1, 20, "step -1 of 20"),
                          (21, 20, "step 21 of 20"), (5, None, "of None"),
                          (5, 20, "stopped at step 5"), (20, 20, "--resume")))
def test_a_generator_that_is_damaged_stopped_or_without_weights_is_not_begun_anew(step, planned,
                                                                                  part, tmp_path):
    path = tmp_path / "generator.pt"
    common.save_checkpoint(path, {"kind": "lipsync", "step": step, "steps": planned})
    with pytest.raises(common.BadInput, match=part):
        loop.is_finished(bare_run(tmp_path, steps=20), "generator")


def test_a_generator_whose_weights_file_is_lost_writes_it_when_resumed(tmp_path):
    common.save_checkpoint(tmp_path / "generator.pt", {"kind": "lipsync", "step": 20, "steps": 20})
    run = bare_run(tmp_path, steps=20, resume=True)
    assert not loop.is_finished(run, "generator")
    (tmp_path / "weights.pt").touch()
    assert loop.is_finished(run, "generator")


def test_a_refused_command_leaves_the_config_of_the_stopped_run(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path / "sync.pt", {"kind": "sync", "step": 2, "steps": 600})
    (tmp_path / "config.json").write_text("as it was")
    monkeypatch.setattr(train, "open_run", lambda config: bare_run(tmp_path, sync_steps=600))
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "x", "--out", str(tmp_path), "--preset",
                                      "tiny", "--sync-lr", "0.5"])
    with pytest.raises(common.BadInput, match="stopped at step 2 of 600"):
        train.main()
    assert (tmp_path / "config.json").read_text() == "as it was"


def test_a_resumed_run_names_what_differs_and_refuses_a_config_that_is_none(tmp_path, capsys):
    file, words = tmp_path / "config.json", ["--out", str(tmp_path), "--resume"]
    saved = dataclasses.asdict(options.TrainConfig(data="x", out=str(tmp_path), workers=1))
    file.write_text(json.dumps(saved))
    assert options.parse_flags([*words, "--workers", "3"]).workers == 3
    assert "--workers 3: the run in" in capsys.readouterr().out
    for wrong in ({**saved, "steps": "many"}, {**saved, "stepz": 1}, ["steps"], {}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(common.BadInput, match="config.json: not the config"):
            options.parse_flags(words)


def test_the_audio_encoder_that_learns_begins_from_the_seed_whatever_was_tried_before(tmp_path):
    run = bare_run(tmp_path)
    first = [p.clone() for p in loop.build_networks(run)[1].parameters()]
    with torch.no_grad():
        for parameter in run.audio_encoder.parameters():
            parameter.add_(1)  # as the first try of the mouth stage does
    again = list(loop.build_networks(run)[1].parameters())
    other = list(loop.build_networks(bare_run(tmp_path, seed=1))[1].parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


class ToyEncoder(torch.nn.Module):
    """A frozen encoder of the quickest kind: zeros, 25 a second."""
    frozen, dim = True, 3

    def forward(self, wave):
        return torch.zeros(1, wave.shape[1] // 640, self.dim)


def test_every_clip_gets_its_features_however_far_one_process_is_ahead_of_another(prepared,
                                                                                  tmp_path,
                                                                                  monkeypatch):
    monkeypatch.setattr(loop, "wait_for_all", print)  # the second begins when the first is done
    infos = [dataclasses.replace(info, path=tmp_path / info.path.name)
             for info in data.list_clips(prepared)[:5]]
    for info in infos:
        shutil.copy(prepared / ".clips" / info.path.name, info.path)
    run = dataclasses.replace(bare_run(tmp_path), clips=infos, features_key="toy",
                              audio_encoder=ToyEncoder(), world=2)
    for rank in (0, 1):
        loop.prepare_features(dataclasses.replace(run, rank=rank))
    assert [info.path.name
            for info in infos if not sampling.feature_path(info.path, "toy").is_file()] == []


def test_offsets_that_were_found_are_not_used_where_the_sound_shall_stay(tmp_path):
    (tmp_path / "offsets.json").write_text('{"a.mp4": 2}')
    assert train.read_offsets(bare_run(tmp_path)) == {"a.mp4": 2}
    assert train.read_offsets(bare_run(tmp_path, keep_offsets=True)) == {}


def test_offsets_of_an_earlier_run_are_found_anew_unless_it_is_resumed(prepared, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(train, "find_offsets", lambda *_: {"new": 1})
    for resume, name in ((True, "old"), (False, "new")):
        run = open_run(prepared, tmp_path, mouth_steps=3, mouth_batch=2, resume=resume)
        (tmp_path / "offsets.json").write_text('{"old": 2}')
        (tmp_path / "mouth.pt").unlink(missing_ok=True)
        assert train.train_mouth(run) and list(train.read_offsets(run)) == [name]


def test_a_sheet_of_samples_whose_clips_are_all_broken_stops_nothing(tmp_path, capsys):
    broken = data.ClipInfo(tmp_path / "gone.npz", "a.mp4", "", 100)
    run = dataclasses.replace(bare_run(tmp_path), held_out=[broken])
    progress.save_samples(run, torch.nn.Identity(), run.audio_encoder, 1)
    assert "gone.npz" in capsys.readouterr().out and not (tmp_path / "samples").exists()


def test_curves_are_a_panel_for_each_loss_two_in_a_row_and_none_without_a_log(tmp_path):
    progress.draw_curves(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "log.csv").write_text(
        "stage,step,total,sync,lr\nsync,20,3,1,1\nsync,40,2,1,1\nmouth,20,5,,1\n"
    )
    progress.draw_curves(tmp_path)
    assert cv2.imread(str(tmp_path / "curves.png")).shape == (
        2 * progress.HEIGHT,
        2 * progress.WIDTH,
        3,
    )


def test_weights_are_the_last_that_were_learned_in_half_the_size(trained):
    made = common.load_checkpoint(trained[0] / "generator.pt")
    small = common.load_checkpoint(trained[0] / "weights.pt")
    for name, value in made["state"]["net"].items():
        assert torch.equal(value, made["model"][name])
        half = value.half() if value.is_floating_point() else value
        assert torch.equal(half, small["model"][name]) and half.dtype == small["model"][name].dtype
    for name, value in made["state"]["audio"].items():
        assert torch.equal(value, made["audio_encoder"]["state"][name])


def test_a_mouth_of_another_network_names_the_field_that_differs(tmp_path):
    run = bare_run(tmp_path)
    net = LipSync(run.net_config)
    config = {**dataclasses.asdict(run.net_config), "lip_width": 7}
    common.save_checkpoint(tmp_path / "mouth.pt", {"kind": "mouth", "config": config, "state": {}})
    with pytest.raises(common.BadInput, match="mouth.pt: does not fit.*lip_width 7 there"):
        train.load_mouth(run, net, run.audio_encoder)


def test_an_error_of_a_loader_process_is_one_line(tmp_path):
    def batches():
        yield {}
        raise RuntimeError(
            "Caught RuntimeError in worker 0.\nTraceback:\n  File x\nclip7.npz: no picture"
        )
    keeper = loop.Keeper(bare_run(tmp_path), "sync", {}, 5, 1, {"kind": "sync"})
    with pytest.raises(common.BadInput) as error:
        for _ in keeper.steps(batches()):
            pass
    assert str(error.value) == "clip7.npz: no picture"


def test_weights_of_another_shape_name_the_field_that_differs(trained, prepared, tmp_path):
    result = training(prepared, tmp_path, "--stage", "generator", "--weights",
                      trained[0] / "weights.pt", "--refs", 2, "--gan-weight", 0)
    assert "Traceback" not in result.stderr
    assert result.returncode == 2 and "refs 3 there, 2 here" in result.stderr


def test_a_poor_sync_expert_is_not_used_and_the_run_says_so(trained, prepared, tmp_path):
    for name in ("sync.pt", "mouth.pt"):
        shutil.copy(trained[0] / name, tmp_path)
    result = training(prepared, tmp_path, "--stage", "generator", "--steps", 1, "--gan-weight", 0,
                      "--lip-weight", 0, "--sync-start", 0)
    assert "sync off (the expert's held-out accuracy" in result.stdout, (
        result.stdout + result.stderr
    )
    assert "offsets.json, of stage mouth, is missing: sounds stay" in result.stdout
    assert not next(csv.DictReader(open(tmp_path / "log.csv")))["sync"]


def test_a_loss_without_a_grade_is_reported_as_off():
    report = train.loss_report(options.TrainConfig(), object(), math.nan, None)
    assert report["sync"].startswith("off (the expert's held-out accuracy nan")
    assert report["lip"].startswith("off")


def test_nan_stops_the_run_names_the_clips_and_keeps_the_last_checkpoint(trained, prepared,
                                                                         tmp_path, monkeypatch):
    run, real, calls = open_run(prepared, tmp_path, trained[0],
                                coarse_weight=0.0), losses.reconstruction_loss, []
    monkeypatch.setattr(losses, "reconstruction_loss",
                        lambda *a: real(*a)
                        * (math.nan if calls.append(1) or len(calls) == 3 else 1))
    with pytest.raises(common.BadInput, match=r"is not finite at step 2.*speaker.*npz"):
        train.train_generator(run)
    assert common.load_checkpoint(tmp_path / "generator.pt")["step"] == 0


def test_a_checkpoint_of_another_network_or_without_a_version_is_one_line(trained, prepared,
                                                                          tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    content = torch.load(tmp_path / "run" / "weights.pt")
    for name, change in (("no version", lambda c: c.pop("version")),
                         ("bad config", lambda c: c["config"].update(refs=-3)),
                         ("other shapes", lambda c: c["config"].update(lip_width=7))):
        changed = json.loads(json.dumps(content["config"]))
        other = {**content, "config": changed}
        change(other)
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(common.BadInput) as error:
            experts.load_networks(tmp_path / "other.pt")
        assert "other.pt" in str(error.value) and "\n" not in str(error.value), name
    state = common.load_checkpoint(tmp_path / "run" / "generator.pt")
    common.save_checkpoint(tmp_path / "run" / "generator.pt",
                            {**state, "state": {**state["state"], "net": {}}, "step": 2})
    result = command("train.py", "--out", tmp_path / "run", "--resume", "--stage", "generator")
    assert result.returncode == 2
    assert "holds another network or is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    common.save_checkpoint(path, {"kind": "lipsync", "step": 1})
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(common.BadInput, match="old file is kept"):
        common.save_checkpoint(path, {"kind": "lipsync", "step": 2})
    monkeypatch.undo()
    assert common.load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_the_mouth_learns_to_open_with_the_sound_and_the_pictures_follow(prepared, tmp_path):
    run = open_run(prepared, tmp_path, mouth_steps=80, mouth_lr=3e-3, steps=60, lr=2e-3, batch=2,
                   keep_offsets=True, amplitude_share=0.0)
    assert train.train_mouth(run) and train.train_generator(run)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    drawn_anew = [float(row["total"]) for row in rows if row["stage"] == "generator"]
    assert drawn_anew[-1] < drawn_anew[0]
    networks = experts.load_networks(tmp_path / "weights.pt")
    clip = data.load_clip(run.clips[0].path)
    with torch.inference_mode():
        features = networks.audio_encoder(torch.from_numpy(clip.sound())[None])[0]
    landmarks, shapes = evaluate.predict_shapes(networks.net, clip, features)
    untrained, _ = evaluate.predict_shapes(LipSync(run.net_config).eval(), clip, features)
    error, before = [metrics.point_error(points, clip.landmarks, metrics.LIPS)
                     for points in (landmarks, untrained)]
    assert error < 0.7 * before
    true = faces.mouth_shape(clip.landmarks)
    assert metrics.correlation(shapes[:, 0], true[:, 0]) > 0.6
    wide = evaluate.predict_shapes(networks.net, clip, features, 1.5)[1][:, 0].mean()
    narrow = evaluate.predict_shapes(networks.net, clip, features, 0.5)[1][:, 0].mean()
    assert narrow < shapes[:, 0].mean() < wide


def test_find_offsets_finds_a_late_sound_and_leaves_what_fits_nowhere(prepared, tmp_path,
                                                                      monkeypatch):
    run, rng = open_run(prepared, tmp_path), np.random.default_rng(0)
    sources = sorted({info.source for info in run.clips})
    late = dict(zip(sources, (2, -3, 0, None)))

    samples = sampling.MouthSamples(run.clips, run.net_config, run.features_key)
    shifts = iter([late[info.source] for info in samples.infos])

    def predicted(run, net, encoder, clip):
        shift, T = next(shifts), len(clip.landmarks)
        points = sampling.at_time(clip.landmarks.reshape(T, -1),
                                  -(shift or 0)).reshape(clip.landmarks.shape).copy()
        if shift is None:
            points[:, faces.GAP_ENDS[1], 1] = rng.normal(150, 9, T)
        return points
    monkeypatch.setattr(train, "predict_clip", predicted)
    net, encoder = loop.build_networks(run)
    assert train.find_offsets(run, net, encoder, samples) == {sources[0]: 2, sources[1]: -3}


def test_teeth_that_change_their_look_vary_and_teeth_that_only_move_do_not():
    points = np.zeros((10, faces.K, 3), np.float32)
    pictures = np.zeros((10, 256, 256, 3), np.uint8)
    for t in range(10):
        points[t, faces.LIPS_INNER[0]] = 100 + t, 150, 0
        points[t, faces.LIPS_INNER[1:]] = 140 + t, 170, 0
        # the upper half of the mouth is white
        pictures[t, 150:160, 100 + t:141 + t] = 200
    still = metrics.teeth_variation(pictures, points)
    pictures[::2] //= 2
    assert still < 1 < 20 < metrics.teeth_variation(pictures, points)
    assert metrics.teeth_variation(pictures[:4], points[:4]) is None


def test_metrics_of_a_picture_against_itself_and_of_a_shifted_series():
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert metrics.ssim(picture, picture) == pytest.approx(1)
    assert metrics.ssim(picture, 255 - picture) < 0
    series = np.random.default_rng(1).normal(size=100)
    assert metrics.correlation(series, 3 * series + 1) == pytest.approx(1)
    assert metrics.correlation(series, series * 0) == 0
    pictures = np.full((2, 256, 256, 3), 50, np.uint8)
    pictures[:, 128:] += 7
    assert metrics.seam(pictures) == 7
    assert metrics.lag_of(np.roll(series, 2), series) == 2
    assert metrics.lag_of(np.roll(series, -3), series) == -3
    for late in (-7, 0, 5):
        assert metrics.lips_find_shift(series, series, late)
        assert not metrics.lips_find_shift(np.roll(series, 3), series, late)  # late itself
    unlike = np.random.default_rng(2).normal(size=100)
    assert np.mean([metrics.lips_find_shift(unlike, series, late) for late in range(-7, 8)]) < 0.5


@pytest.mark.parametrize("warp", (True, False))
def test_the_parts_that_are_timed_draw_together_what_the_network_draws(warp):
    net, inputs = LipSync(dataclasses.replace(CONV, warp=warp)).eval(), moving(CONV)
    with torch.inference_mode():
        parts = dict(evaluate.forward_parts(net, *inputs))
        assert torch.equal(parts["decoder"], net(*inputs))
    columns = [c for c in evaluate.COLUMNS["speed"] if warp or c != "warp"]
    assert ["gmac", *parts, "all", "threads"] == columns
    row = evaluate.measure_speed(net, seconds=0)
    assert list(row) == columns
    assert row["gmac"] == lipsync.gmac(net, *lipsync.example(net.config))[0]
    assert min(row.values()) > 0 and row["all"] == pytest.approx(sum(row[part] for part in parts))


def test_a_reference_warped_to_its_own_lips_stays_and_to_another_frames_lips_comes_nearer_it(
        networks, prepared, monkeypatch):
    clip = data.load_clip(data.list_clips(prepared)[0].path)
    refs, points = sampling.clip_points(clip.landmarks, networks.net.config)
    at = np.array([refs[-1], refs[0]])
    features = torch.zeros(len(clip), networks.net.config.audio_dim)
    last, first = (clip.frame(i).astype(int)[150:210, 80:176] for i in at)

    def warped(lips):
        monkeypatch.setattr(networks.net, "predict_lips", lambda audio, amplitude,
                            points: torch.from_numpy(lips))
        return evaluate.warp_reference(networks.net, clip, features, at).astype(int)[
            :, 150:210, 80:176
        ]
    own, moved = warped(clip.landmarks[at][:, faces.MOUTH, :2] / faces.CROP_PX)
    # the last reference's own lips, with the frame's head pose
    _, posed = warped(points[at, -1, 1][:, faces.MOUTH])
    assert np.abs(own - last).max() <= 1
    assert np.abs(moved - first).mean() < 0.95 * np.abs(posed - first).mean()


def test_the_strips_rows_are_two_references_the_warped_one_the_output_and_the_truth(networks,
                                                                                    prepared,
                                                                                    tmp_path):
    clip = data.load_clip(data.list_clips(prepared)[0].path)
    true = evaluate.clip_frames(clip)
    evaluate.save_strip(tmp_path / "strip.png", networks.net, clip,
                        torch.zeros(len(clip), networks.net.config.audio_dim), 255 - true)
    sheet = cv2.imread(str(tmp_path / "strip.png"))[..., ::-1]
    closed, last, warped, made, truth_ = (sheet[256 * i:][:256] for i in range(5))
    refs, _ = sampling.clip_points(clip.landmarks, networks.net.config)
    assert sheet.shape == (5 * 256, 10 * 256, 3)
    assert (made == 255 - truth_).all()
    assert (truth_[:, -256:] == true[-1]).all()
    assert (closed[:, 256:512] == true[refs[0]]).all() and (last[:, :256] == true[refs[-1]]).all()
    # what lies above the warp stays
    assert (warped[:96] == last[:96]).all() and (warped[128:] != last[128:]).any()


def test_each_video_of_a_folder_is_measured_once_before_any_twice():
    infos = [data.ClipInfo(pathlib.Path(f"{source}_{n}"), source, "", 50)
             for source in ("a/1", "a/2", "b/3") for n in range(3)]
    assert [str(info.path) for info in evaluate.choose_clips(infos, 1)] == ["a/1_0", "b/3_0"]
    assert [str(info.path) for info in evaluate.choose_clips(infos, 3)] == [
        "a/1_0",
        "a/2_0",
        "a/1_1",
        "b/3_0",
        "b/3_1",
        "b/3_2",
    ]


# ---------------------------------------------------------------- dubbing
@pytest.fixture(scope="module")
def dubbing(tmp_path_factory):
    """A folder with clip.mp4 (2 s), long.wav (5 s), short.wav (0.6 s), face.png and random tiny
    weights."""
    folder = tmp_path_factory.mktemp("corpus")
    drawn.draw_clip(folder / "clip.mp4", drawn.Speaker.draw(1), seed=1, seconds=2)
    wave = media.read_audio(folder / "clip.mp4")
    soundfile.write(folder / "long.wav", np.tile(wave, 4)[:16000 * 5], 16000)
    soundfile.write(folder / "short.wav", wave[:9600], 16000)
    cv2.imwrite(str(folder / "face.png"), next(media.read_frames(folder / "clip.mp4"))[..., ::-1])
    torch.manual_seed(0)
    config = lipsync.PRESETS["tiny"]
    net, ear = lipsync.LipSync(config), lipsync.build_audio_encoder(config)
    common.save_checkpoint(folder / "tiny.pt",
                            {"kind": "lipsync", "config": dataclasses.asdict(config),
                             "model": net.state_dict(),
                             "audio_encoder": {"dims": ear.dims, "state": ear.state_dict()},
                             "sync": None, "lip": None})
    return folder


@pytest.fixture(scope="module")
def networks(dubbing):
    return experts.load_networks(dubbing / "tiny.pt")


def frames_of(path):
    return list(media.read_frames(path))


def test_longer_sound_plays_the_frames_forward_backward_forward_bit_equal_to_the_first(dubbing):
    frames = frames_of(dubbing / "clip.mp4")
    T = len(frames)
    order = [*range(T), *range(T - 2, -1, -1), *range(1, T), *range(T - 2, T - 9, -1)]
    media.CHUNK_BYTES, kept = 7 * frames[0].nbytes, media.CHUNK_BYTES  # pieces that do not divide T
    try:
        played = list(media.play(dubbing / "clip.mp4", T, len(order)))
        assert [t for t, _ in played] == order
        assert all(np.array_equal(frame, frames[t]) for t, frame in played)
    finally:
        media.CHUNK_BYTES = kept


def test_the_copy_that_is_played_backwards_holds_no_more_than_it_may(dubbing, monkeypatch):
    frames = frames_of(dubbing / "clip.mp4")
    T = len(frames)
    monkeypatch.setattr(media, "SWING_BYTES", 10 * frames[0].nbytes)
    played = list(media.play(dubbing / "clip.mp4", T, T + 25))
    back, forth = [*range(T - 2, T - 10, -1)], [*range(T - 10, T)]
    assert [t for t, _ in played] == [*range(T), *back, *forth, *back][:T + 25]
    assert all(np.array_equal(frame, frames[t]) for t, frame in played)


def test_the_dubbed_video_is_as_long_as_the_sound(dubbing, networks, tmp_path):
    for sound, count in (("short.wav", 15), ("long.wav", 125)):
        report = infer.dub(dubbing / "clip.mp4", dubbing / sound, tmp_path / "out.mp4", networks,
                           device="cpu")
        assert report["frames"] == count == len(frames_of(tmp_path / "out.mp4"))
        assert abs(len(media.read_audio(tmp_path / "out.mp4")) - count * 640) < 2048  # AAC pads


def test_a_still_picture_is_dubbed(dubbing, networks, tmp_path):
    report = infer.dub(dubbing / "face.png", dubbing / "short.wav", tmp_path / "out.mp4", networks,
                       refs_sheet=tmp_path / "refs.png")
    assert report["frames"] == 15 and report["kept"] == 0
    assert cv2.imread(str(tmp_path / "refs.png")).shape == (512, 3 * 256, 3)


def test_pixels_outside_the_mask_are_bit_equal_and_the_lower_face_changes(dubbing):
    frame = frames_of(dubbing / "clip.mp4")[0]
    with faces.FaceTracker() as tracker:
        points = np.stack(tracker.find(frame)[:1])
    affine = faces.smooth_affines(points)[0]
    inside, lower_lip = faces.to_crop(points[0], affine), faces.GAP_ENDS[1]
    mask = infer.face_mask(infer.face_outline(inside))
    assert not mask[:infer.MASK_TOP].any()
    assert mask[int(inside[lower_lip, 1]), int(inside[lower_lip, 0])] == 255
    dubbed = infer.blend(frame, np.full((256, 256, 3), (255, 0, 255), np.uint8), affine, mask)
    height, width = frame.shape[:2]
    share = cv2.warpAffine(mask, cv2.invertAffineTransform(affine), (width, height))
    share = cv2.dilate(share, np.ones((3, 3)))
    assert np.array_equal(dubbed[share == 0], frame[share == 0])
    x, y = points[0, lower_lip, :2].round().astype(int)
    assert tuple(dubbed[y, x]) == (255, 0, 255)


def test_a_picture_in_other_colours_leaves_no_step_along_the_mask(dubbing):
    frame = frames_of(dubbing / "clip.mp4")[0]
    with faces.FaceTracker() as tracker:
        points = np.stack(tracker.find(frame)[:1])
    affine = faces.smooth_affines(points)[0]
    mask = infer.face_mask(infer.face_outline(faces.to_crop(points[0], affine)))
    crop = faces.crop(frame, affine)
    other = np.clip(crop.astype(int) + (8, -5, 4), 0, 255).astype(np.uint8)
    rim = (mask > 60) & (mask < 200)
    step = lambda picture: np.abs(picture[rim].astype(float).mean(0) - crop[rim].mean(0)).max()
    assert step(other) > 4 and step(infer.match_colour(crop, other, mask)) < 1


def test_frames_without_a_face_stay_and_are_counted(dubbing, networks, tmp_path):
    frames = frames_of(dubbing / "clip.mp4")
    for frame in frames[20:30]:
        frame[:] = 40
    with media.VideoWriter(tmp_path / "gap.mp4", fps=25) as writer:
        for frame in frames:
            writer.write(frame)
    report = infer.dub(tmp_path / "gap.mp4", dubbing / "clip.mp4", tmp_path / "out.mp4", networks)
    assert report["frames"] == 50 and 10 <= report["kept"] <= 12
    assert report["reasons"]["no face"] == (report["kept"], pytest.approx(0.8, abs=0.05))
    dubbed = frames_of(tmp_path / "out.mp4")
    assert abs(dubbed[25].astype(int) - 40).max() <= 3
    assert abs(dubbed[10].astype(int) - 40).max() > 100


@pytest.mark.parametrize("case", "video_missing video_folder video_text video_empty "
                                 "video_truncated playlist no_face audio_missing audio_silentvideo "
                         "weights_missing weights_foreign weights_code amplitude out_folder "
                         "out_suffix face compare_video compare_out".split())
def test_bad_input_names_the_fault_in_one_line_and_leaves_no_file(case, dubbing, networks,
                                                                  tmp_path):
    video, audio, weights, out = (
        dubbing / "clip.mp4",
        dubbing / "short.wav",
        dubbing / "tiny.pt",
        tmp_path / "out.mp4",
    )
    odd = tmp_path / "odd ' ü.mp4"
    text = {"video_text": b"hello", "video_empty": b"",
            "playlist": f"#EXTM3U\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n".encode(),
            "video_truncated": (dubbing / "clip.mp4").read_bytes()[:3000],
            "weights_foreign": b"PK nothing"}.get(case)
    if text is not None:
        odd.write_bytes(text)
    if case == "weights_code":
        odd.write_bytes(pickle.dumps(print, 2))
    if case in ("no_face", "audio_silentvideo"):
        with media.VideoWriter(odd) as writer:
            for _ in range(5):
                writer.write(np.full((120, 160, 3), 90, np.uint8))
    video = {"video_missing": tmp_path / "no.mp4", "video_folder": tmp_path}.get(
        case,
        odd
        if case in ("video_text", "video_empty", "video_truncated", "playlist", "no_face")
        else video,
    )
    audio = {"audio_missing": tmp_path / "no.wav", "audio_silentvideo": odd}.get(case, audio)
    weights = {"weights_missing": tmp_path / "no.pt", "weights_foreign": odd,
               "weights_code": odd}.get(case, weights)
    out = {"out_folder": tmp_path / "no" / "out.mp4", "out_suffix": tmp_path / "out.txt"}.get(
        case, out
    )
    more = {"amplitude": {"amplitude": 3.0}, "face": {"face": 7},
            "compare_video": {"compare": video}, "compare_out": {"compare": out}}.get(case, {})
    before, size = sorted(tmp_path.rglob("*")), (dubbing / "clip.mp4").stat().st_size
    with pytest.raises(common.BadInput) as error:
        infer.dub(video, audio, out, weights if case.startswith("weights") else networks, **more)
    assert case.split("_")[0] in ("amplitude",
                                  "face") or any(str(path) in str(error.value)
                                                 for path in (video, audio, weights, out))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (dubbing / "clip.mp4").stat().st_size == size


def test_the_command_turns_bad_input_into_one_line_and_exit_2(dubbing, tmp_path):
    result = command("infer.py", tmp_path / "no ' ü.mp4", dubbing / "short.wav", "--weights",
                     dubbing / "tiny.pt", "--out", tmp_path / "out.mp4")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "no ' ü.mp4" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_dubs_and_prints_its_speed_and_the_path(dubbing, tmp_path):
    out = tmp_path / "a 'b' ü.mp4"
    result = command("infer.py", dubbing / "clip.mp4", dubbing / "short.wav", "--weights",
                     dubbing / "tiny.pt", "--out", out, "--compare", tmp_path / "c.png")
    assert result.returncode == 0 and result.stdout.endswith(f"written: {out}\n"), result.stderr
    assert re.search(r"15 frames in [\d.]+ s: [\d.]+ frames/s, the first after [\d.]+ s",
                     result.stdout)
    assert "kept" not in result.stdout
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "c.png"]
    assert cv2.imread(str(tmp_path / "c.png")).shape == (512, 8 * 256, 3)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_file_and_no_child_process(sent, dubbing, tmp_path):
    # a job in the background ignores Ctrl-C
    process = subprocess.Popen([sys.executable, str(HERE / "infer.py"), dubbing / "clip.mp4",
                                dubbing / "long.wav", "--weights", dubbing / "tiny.pt", "--out",
                                tmp_path / "out.mp4"], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(4800):                                            # until the encoder has begun
        if list(tmp_path.glob(".*")):
            break
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert children and process.returncode == 130 and "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_memory_does_not_grow_with_the_length(dubbing, tmp_path):
    code = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); import experts, infer, "
        "torch; torch.set_num_threads(1)\n"
        "infer.dub(*sys.argv[2:5], experts.load_networks(sys.argv[5]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = [int(subprocess.run([sys.executable, "-c", code, str(HERE), dubbing / "clip.mp4",
                                 dubbing / sound, tmp_path / "out.mp4", dubbing / "tiny.pt"],
                                capture_output=True, text=True, timeout=400).stdout)
             for sound in ("short.wav", "long.wav")]
    assert peaks[1] - peaks[0] < 150, peaks                           # MB


# ---------------------------------------------------------------- scenes: cuts, people, turned face
@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two drawn speakers, 3 s each, at 640 x 360: a.mp4 and b.mp4, and a.wav."""
    folder = tmp_path_factory.mktemp("people")
    for name, who in (("a", 1), ("b", 5)):
        drawn.draw_clip(folder / f"{name}_large.mp4", drawn.Speaker.draw(who), seed=who, seconds=3)
        ffmpeg("-i", folder / f"{name}_large.mp4", "-vf", "scale=640:360", "-crf", 14, "-preset",
               "ultrafast", folder / f"{name}.mp4")
    ffmpeg("-i", folder / "b_large.mp4", "-vn", folder / "a.wav")
    return folder


def film(people, name, graph, *inputs):
    """One of the scenes below, made by ffmpeg's filters"""
    files = [word for one in inputs for word in ("-i", people / f"{one}.mp4")]
    ffmpeg(*files, "-filter_complex", graph + ",setsar=1,fps=25,format=yuv420p[out]", "-map",
           "[out]", "-crf", 14, "-preset", "ultrafast", people / name)
    return people / name


ZOOM = "scale=800:450,crop=640:360:80:20"
PUNCH_IN = (
    "[0:v]trim=0:1.4,setpts=PTS-STARTPTS[x];"
    f"[0:v]trim=1.4:2.8,setpts=PTS-STARTPTS,{ZOOM}[y];[x][y]concat"
)
MIRRORED = (
    "[0:v]trim=0:1,setpts=PTS-STARTPTS[x];"
    f"[0:v]trim=1:2,setpts=PTS-STARTPTS,hflip,{ZOOM}[y];"
    "[0:v]trim=2:3,setpts=PTS-STARTPTS[z];[x][y][z]concat=n=3"
)
ELSEWHERE = (
    "[0:v]trim=0:1.4,setpts=PTS-STARTPTS,scale=960:540,crop=640:360:20:60[x];"
    "[0:v]trim=1.4:2.8,setpts=PTS-STARTPTS,scale=960:540,crop=640:360:300:60[y];[x][y]concat"
)
# The mouth is covered: no mesh fits.
COVERED = "trim=end_frame=1,loop=29:1,setpts=N/25/TB,drawbox=0:200:640:60:0x28283c:fill"
LYING = COVERED + ",transpose=1"
IN_TURN = (
    "[0:v]trim=0:1.2,setpts=PTS-STARTPTS[x];"
    "[1:v]trim=1.2:2,setpts=PTS-STARTPTS[y];"
    "[0:v]trim=2:3,setpts=PTS-STARTPTS[z];[x][y][z]concat=n=3"
)


@pytest.mark.parametrize("name, graph, inputs, cuts",
                         (("punchin.mp4", PUNCH_IN, "a", [35]),
                          ("elsewhere.mp4", ELSEWHERE, "a", [35]),
                          ("vlog_cuts.mp4", MIRRORED, "a", [25, 50]),
                          ("in_turn.mp4", IN_TURN, "ab", [30, 50])))
def test_every_shot_is_tracked_and_cropped_for_itself_and_no_frame_is_kept_back(name, graph, inputs,
                                                                                cuts, people):
    video = film(people, name, graph, *inputs)
    track = watch.watch(video, 1000, None, 3, False)
    assert np.flatnonzero(np.diff(track.shots)).tolist() == [cut - 1 for cut in cuts]
    assert track.dubbed.all()
    with faces.FaceTracker() as tracker:
        for t, frame in enumerate(media.read_frames(video)):
            if min(abs(t - cut) for cut in cuts) > 10:
                continue
            tracker.forget()                      # sees this frame alone
            found = faces.to_crop(max(tracker.find(frame), key=faces.face_size), track.affines[t])
            mouths = [points[faces.LIPS_OUTER, :2].mean(0) for points in (found, track.points[t])]
            off = mouths[0] - mouths[1]
            assert np.linalg.norm(off) < 5, (t, off)
    measured, _ = experts.place_crops(experts.track_face(video))
    apart = np.abs(measured - track.affines)[..., 2].max(1)  # px, of each frame's crop
    assert np.median(apart) < 1 and apart.max() < 5


def test_shots_of_one_person_share_references_and_another_person_has_his_own(people):
    track = watch.watch(film(people, "in_turn.mp4", IN_TURN, "a", "b"), 1000, None, 3, False)
    first, second, third = track.person_of
    assert first is third and first is not second
    assert set(first.frames) <= {*range(30), *range(50, 75)}
    assert set(second.frames) <= set(range(30, 50))
    plain = watch.watch(people / "b.mp4", 1000, None, 3, False).person_of[0]
    apart = [np.abs(person.refs.astype(float).mean(0) - plain.refs.mean(0)).mean()
             for person in (second, first)]
    assert apart[0] < 0.5 * apart[1]              # b's references show b


LATE = (
    "[0:v]scale=480:270,pad=480:360:0:45[x];[x][1:v]hstack,trim=end_frame=20,"
    "drawbox=480:200:640:60:0x28283c:fill:enable='eq(n,0)'"  # the larger face is not found at first
)


def test_a_face_that_comes_into_view_after_the_first_frame_is_dubbed(people):
    track = watch.watch(film(people, "late.mp4", LATE, "a", "b"), 1000, None, 3, False)
    # of the two trackers, one saw the small face alone and searches again only later
    assert track.dubbed[3::2].all() and set(track.reasons) == {"", "no face"}
    back = cv2.invertAffineTransform(track.affines[10])
    assert back[0] @ [128, 128, 1] > 480  # the crop's middle lies in the right picture


def test_a_frame_behind_a_cut_is_judged_by_the_tracker_that_is_its_own(monkeypatch):
    class Tracker:
        def forget(self):
            self.lying = False

        def find(self, frame):
            self.lying = bool(frame.max() > 100)  # bright: a face that lies
            return [] if self.lying else [face]
    face = np.random.default_rng(0).normal(50, 9, (faces.K, 3))
    monkeypatch.setattr(faces, "FaceTracker", Tracker)
    frames = [np.full((96, 96, 3), 200 if i >= 8 else 0, np.uint8) for i in range(16)]
    rows = list(faces.track_shots(frames, [Tracker(), Tracker()]))
    assert [t for t, row in enumerate(rows) if row[3]] == [13]  # the sixth frame without a face
    assert [lying for _, _, lying, _ in rows] == [False] * 8 + [True] * 8


def test_a_dub_across_cuts_keeps_everything_outside_the_masks_and_draws_one_mouth(people, networks,
                                                                                  tmp_path):
    video = film(people, "vlog_cuts.mp4", MIRRORED, "a")
    report = infer.dub(video, people / "a.wav", tmp_path / "out.mp4", networks)
    assert report["kept"] == 0 and report["reasons"] == {}
    for before, after in zip(media.read_frames(video), media.read_frames(tmp_path / "out.mp4")):
        with_face = np.abs(before.astype(int) - after).max(2) > 40
        rows, columns = np.nonzero(with_face)
        if len(rows):                             # changes lie in one place of a mouth's size
            assert np.ptp(rows) < 110 and np.ptp(columns) < 130


@pytest.mark.parametrize("height, width", ((1, 1), (4, 4), (2, 600), (600, 3), (40, 33_000)))
def test_a_picture_of_any_form_is_looked_at(height, width):
    with faces.FaceTracker() as tracker:
        assert tracker.find(np.zeros((height, width, 3), np.uint8)) == []


def test_a_turned_picture_with_transparency_is_read_whole(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    picture = Image.fromarray(np.full((40, 20, 4), 200, np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    assert next(media.read_frames(tmp_path / "turned.png")).shape[2] == 3


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    common.write_whole(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError):
        common.write_whole(tmp_path / "a.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_picture_is_saved_under_a_name_that_is_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"q\xff.png")
    media.save_png(path, np.full((4, 4, 3), (250, 0, 0), np.uint8))
    assert media.read_picture(path)[0, 0].tolist() == [250, 0, 0]


def test_a_polite_kill_ends_the_workers_too_and_leaves_nothing_half_written(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "data.py", "--demo", tmp_path, "--clips",
                                "20", "--speakers", "20"], stderr=subprocess.PIPE, text=True)
    for _ in range(4800):
        if list(tmp_path.glob(".*.mp4")):         # a worker is drawing
            break
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("stopped\n"), errors
    assert "Traceback" not in errors and not list(tmp_path.glob(".*"))
    for _ in range(100):                          # its resource tracker ends after it
        alive = [child for child in children if os.path.exists(f"/proc/{child}")]
        if not alive:
            break
        time.sleep(0.05)
    assert children and not alive


@pytest.mark.parametrize("flag", ("--workers", "--clips", "--speakers", "--seed"))
def test_a_number_out_of_range_is_refused(flag, tmp_path):
    result = command("data.py", "--demo", tmp_path, flag, -1)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {flag} -1: must be"), result


def test_a_folder_in_a_files_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    result = command("data.py", "--demo", tmp_path / "file")
    assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_held_out_name_that_no_video_has_is_refused():
    infos = [data.ClipInfo(pathlib.Path("a.npz"), "a.mp4", "", 50)]
    with pytest.raises(common.BadInput, match="--held-out nobody: no video of that name"):
        data.split_clips(infos, "a,nobody")


def test_foreign_files_beside_the_manifests_are_left_alone(tmp_path):
    (tmp_path / ".clips").mkdir()
    for number, text in enumerate(("[]", '{"signature": 5}', '{"signature": []}', "{")):
        (tmp_path / ".clips" / f"{number}.json").write_text(text)
    assert data.list_clips(tmp_path) == []


def test_a_manifests_name_fits_any_file_system(tmp_path):
    name = data.manifest(tmp_path / ("\U0001d400" * 60 + ".mp4"), tmp_path).name
    assert len(os.fsencode(name)) < 180


@pytest.mark.parametrize("content", ("[1]", '{"a.mp4": 1.5}', '{"a.mp4": 1'))
def test_broken_offsets_are_named(content, tmp_path):
    (tmp_path / "offsets.json").write_text(content)
    with pytest.raises(common.BadInput, match="offsets.json"):
        train.read_offsets(bare_run(tmp_path))


def test_the_largest_face_that_can_be_dubbed_is_chosen_not_the_largest(people):
    both = (
        "[0:v]trim=0:2,scale=960:540,crop=400:360:280:60,pad=840:360:0:0[x];[1:v]trim=0:2,"
        "scale=1280:720,crop=440:230:420:90[y];"
        "[x][y]overlay=400:130:shortest=1"
    )
    video = film(people, "edge.mp4", both, "a", "b")
    track = watch.watch(video, 1000, None, 3, False)
    x = (track.affines[20][:, :2] @ [0, 0]
         + np.linalg.solve(track.affines[20][:, :2], [128, 128] - track.affines[20][:, 2]))[0]
    assert track.dubbed.all() and x < 400          # the smaller, whole face on the left


def test_lying_and_upside_down_faces_are_tracked_where_they_are(people):
    upright = watch.watch(people / "a.mp4", 20, None, 3, False)
    for name, turn, back in (("left", "transpose=2", 1), ("right", "transpose=1", 3),
                             ("upside", "hflip,vflip", 2)):
        video = film(people, f"{name}.mp4", f"[0:v]trim=0:1,{turn}", "a")
        track = watch.watch(video, 20, None, 3, False)
        assert track.dubbed.all()
        frame, plain = next(media.read_frames(video)), next(media.read_frames(people / "a.mp4"))
        crops = faces.crop(frame, track.affines[0]), faces.crop(plain, upright.affines[0])
        assert np.abs(crops[0].astype(float) - crops[1])[60:200, 60:196].mean() < 12, name


def test_a_lying_face_that_cannot_be_followed_is_refused_as_such(people, tmp_path):
    video, sound = film(people, "lying.mp4", f"[0:v]{LYING},setsar=1", "a"), people / "a.wav"
    with pytest.raises(common.BadInput, match=rf"^{re.escape(str(video))}: {faces.LYING}$"):
        watch.watch(video, 1000, None, 3, False)
    ffmpeg("-i", video, "-i", sound, "-c:v", "copy", "-shortest", tmp_path / "lying.mp4")
    assert data.prepare(tmp_path, workers=1)["refused"] == {faces.LYING: 1}
    with pytest.raises(common.BadInput, match="no face in any of its 30 frames"):
        watch.watch(film(people, "covered.mp4", f"[0:v]{COVERED}", "a"), 1000, None, 3, False)
    then = film(
        people,
        "then_lying.mp4",
        f"[0:v]trim=0:1,crop=360:360:140:0,pad=360:640:0:140,setsar=1[x];[0:v]{LYING},setsar=1[y];"
        f"[x][y]concat",
        "a",
    )
    reasons = watch.watch(then, 1000, None, 3, False).reasons
    assert not any(reasons[:25]) and set(reasons[35:]) == {faces.LYING}


def test_a_face_at_the_edge_is_counted_as_partly_outside_and_a_whole_one_is_dubbed(people):
    edge = ("[0:v]trim=0:1,setpts=PTS-STARTPTS,crop=345:360:150:0,setsar=1[x];"
            "[1:v]trim=1:2,setpts=PTS-STARTPTS,crop=345:360:295:0,setsar=1[y];[x][y]concat")
    track = watch.watch(film(people, "edgeface.mp4", edge, "a", "b"), 1000, None, 3, False)
    assert track.dubbed.tolist() == 25 * [True] + 25 * [False]
    assert track.reasons == 25 * [""] + 25 * ["partly outside"]


def test_a_picture_that_changes_its_size_is_fitted_not_stretched():
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, :] = 200
    fitted = media.fit(frame, 30, 30)
    assert fitted.shape == (30, 30, 3)
    assert (fitted[8:22] > 190).all()
    assert not fitted[:7].any()
    assert not fitted[23:].any()


def test_a_mesh_that_disagrees_with_the_detectors_eyes_and_mouth_is_no_face():
    points = face()[0]
    eyes = points[faces.kept(faces.RIGID_MESH[:4]), :2].reshape(2, 2, 2).mean(1)
    box = np.r_[points[:, :2].min(0), points[:, :2].max(0)]
    right = faces.Detection(0.9, box, eyes, points[faces.MOUTH_CORNERS, :2].mean(0))
    wrong = dataclasses.replace(right, mouth=right.mouth - (0, 90), eyes=right.eyes + (0, 60))
    assert faces.agrees(points, [right])
    assert not faces.agrees(points, [wrong])
    assert faces.agrees(points, [])


# ---------------------------------------------------------------- media: people's own files
def worst_difference(made, expected):
    """Mean difference of frames, 0..255, of the worst frame"""
    return max(np.abs(a.astype(float) - b).mean() for a, b in zip(made, expected, strict=True))


def test_colours_survive_every_kind_of_signalling(people, tmp_path):
    bars = "smptebars=s=640x360:r=25:d=0.4,format=yuv444p"
    tags = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
            "-color_range", "tv")
    lossless = ("-c:v", "libx264", "-qp", 0, "-preset", "ultrafast")
    ffmpeg("-f", "lavfi", "-i", bars, "-vf", "scale=out_color_matrix=bt709:out_range=tv", *lossless,
           *tags, tmp_path / "base.mp4")
    base = frames_of(tmp_path / "base.mp4")
    ffmpeg(
        "-i",
        tmp_path / "base.mp4",
        "-vf",
        "scale=1280:720:flags=neighbor,setparams=colorspace=unknown:color_primaries=unknown:"
        "color_trc=unknown:range=unknown",
        *lossless,
        tmp_path / "untagged.mp4",
    )
    large = [cv2.resize(frame, (640, 360), interpolation=cv2.INTER_AREA)
             for frame in frames_of(tmp_path / "untagged.mp4")]
    assert worst_difference(large, base) < 0.7
    ffmpeg("-i", tmp_path / "base.mp4", "-vf",
           "scale=in_color_matrix=bt709:out_color_matrix=bt709:out_range=pc:flags=accurate_rnd",
           *lossless, "-color_range", "pc", *tags[:6], tmp_path / "full.mp4")
    assert worst_difference(frames_of(tmp_path / "full.mp4"), base) < 0.7
    ffmpeg(
        "-i",
        tmp_path / "base.mp4",
        "-vf",
        "zscale=min=709:tin=709:pin=709:rin=tv:t=smpte2084:p=2020:m=2020_ncl:r=tv:npl=203,"
        "format=yuv420p10le",
        "-c:v",
        "libx265",
        "-x265-params",
        "log-level=error:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc",
        "-crf",
        8,
        "-preset",
        "ultrafast",
        "-color_primaries",
        "bt2020",
        "-color_trc",
        "smpte2084",
        "-colorspace",
        "bt2020nc",
        tmp_path / "hdr.mp4",
    )
    assert worst_difference(frames_of(tmp_path / "hdr.mp4"), base) < 4
    ffmpeg("-i", tmp_path / "hdr.mp4", "-c", "copy", "-bsf:v",
           "hevc_metadata=colour_primaries=2:matrix_coefficients=2", tmp_path / "part.ts")
    # only the transfer curve is tagged
    assert worst_difference(frames_of(tmp_path / "part.ts"), base) < 4


def test_frames_are_written_in_the_matrix_of_the_video_they_come_from(people, tmp_path):
    untagged = (
        "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown:range=unknown"
    )
    for matrix, tags in (("bt601", untagged), ("bt709", "setparams=colorspace=bt709")):
        video, written = tmp_path / f"{matrix}.avi", tmp_path / f"{matrix}.mp4"
        bars = (
            f"[1:v]scale=out_color_matrix=bt709[b];[0:v][b]hstack,scale=in_color_matrix=bt709:"
            f"out_color_matrix={matrix},{tags}")
        ffmpeg("-i", people / "a.mp4", "-f", "lavfi", "-i", "smptebars=s=64x360:r=25",
               "-filter_complex", bars, "-t", 0.4, "-c:v", "libx264", "-crf", 8, "-preset",
               "ultrafast", "-pix_fmt", "yuv420p", video)
        frames = frames_of(video)
        with media.VideoWriter(written, like=video) as writer:
            for frame in frames:
                writer.write(frame)
        assert worst_difference(frames_of(written), frames) < 0.7


@pytest.mark.parametrize("channels", (2, 3, 9, 32))
def test_a_sound_of_any_number_of_channels_is_written(channels, tmp_path):
    tone = np.sin(np.arange(8000) * 0.2) * 0.3
    soundfile.write(tmp_path / "n.wav", np.repeat(tone[:, None], channels, 1), 16000)
    with media.VideoWriter(tmp_path / "n.mp4", tmp_path / "n.wav", seconds=0.4) as writer:
        for _ in range(10):
            writer.write(np.zeros((64, 64, 3), np.uint8))
    assert np.abs(media.read_audio(tmp_path / "n.mp4")).max() > 0.1


def test_transparent_places_are_black_whatever_lies_under_them(people, tmp_path):
    see_through = (
        "format=rgba,geq=r='if(lt(X,320),r(X,Y),0)':g='if(lt(X,320),g(X,Y),255)':b='if(lt(X,320),"
        "b(X,Y),0)':a='if(lt(X,320),255,0)'")
    for name, codec in (("alpha.mov",
                         ("-pix_fmt", "yuva444p10le", "-c:v", "prores_ks", "-profile:v", "4444")),
                        ("alpha.webm",
                         ("-pix_fmt", "yuva420p", "-c:v", "libvpx-vp9", "-deadline", "realtime",
                          "-cpu-used", 8, "-crf", 10, "-b:v", 0)),
                        ("alpha.png", ("-frames:v", 1, "-pix_fmt", "rgba"))):
        ffmpeg("-i", people / "a.mp4", "-t", 0.2, "-vf", see_through, *codec, tmp_path / name)
        frame = frames_of(tmp_path / name)[0]
        assert frame[:, 340:].max() < 12 and frame[:, :300].mean() > 30, name


def test_interlaced_pictures_have_no_combs(people, tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=320x240:r=50:d=1", "-vf",
           "scroll=h=0.02,tinterlace=interleave_top,setfield=tff", "-c:v", "mpeg2video", "-q:v", 2,
           "-flags", "+ildct+ilme", tmp_path / "i.mpg")
    frames = frames_of(tmp_path / "i.mpg")
    # a second: a picture of each field is no frame more
    assert len(frames) == 25
    frame = frames[10].astype(int)
    comb = (
        np.abs(2 * frame[1:-1] - frame[:-2] - frame[2:]).mean()
        / np.abs(frame[2:] - frame[:-2]).mean()
    )
    assert comb < 1.2                             # 2.6 without deinterlacing


@pytest.mark.parametrize("cut",
                         ("[0:v]trim=start=0.8[v];[1:a]anull[a]",
                          "[0:v]null[v];[1:a]atrim=start=0.8[a]"), ids=("sound", "pictures"))
@pytest.mark.parametrize("suffix", ("ts", "m2ts", "mkv"))
def test_where_sound_or_pictures_begin_first_both_stay_in_their_places_also_in_what_is_written(
        suffix, cut, tmp_path):
    path, written = tmp_path / f"skew.{suffix}", tmp_path / "written.mp4"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "color=gray:s=160x120:r=25:d=3,drawbox=0:0:160:120:white:fill:enable='between(t,1.999,"
        "2.079)'",
        "-f",
        "lavfi",
        "-i",
        "sine=1000:r=48000:d=3,volume='if(between(t,2,2.08),1,0)':eval=frame",
        "-filter_complex",
        cut,
        "-map",
        "[v]",
        "-map",
        "[a]",
        "-c:v",
        "libx264",
        "-g",
        25,
        "-pix_fmt",
        "yuv420p",
        "-c:a",
        "aac",
        path,
    )
    frames = frames_of(path)
    with media.VideoWriter(written, path, seconds=len(frames) / 25) as writer:
        for frame in frames:
            writer.write(frame)
    flash = np.argmax([frame.mean() > 200 for frame in frames]) / 25
    for heard in (path, written):
        beep = np.argmax(np.abs(media.read_audio(heard)) > 0.02) / 16000
        assert abs(flash - beep) <= 0.045, heard


def test_a_damaged_time_is_left_out_and_hours_are_not_filled(tmp_path):
    path = tmp_path / "jump.ts"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=25:d=3", "-f", "lavfi", "-i", "sine=300:d=3",
           "-c:v", "mpeg2video", "-c:a", "mp2", "-pes_payload_size", 0, path)
    content = bytearray(path.read_bytes())
    for stream in (0xE0, 0xC0):                   # pictures, sound
        packets = [m.start() for m in re.finditer(b"\0\0\1" + bytes([stream]), content)]
        content[packets[20] + 9] |= 0x08          # the highest bit of the time: 13 hours
    path.write_bytes(content)
    count = sum(1 for _ in itertools.islice(media.read_frames(path), 1000))
    assert 70 <= count <= 80
    with media.VideoWriter(tmp_path / "out.mp4", path, seconds=3) as writer:
        for frame in [np.zeros((64, 64, 3), np.uint8)] * 75:
            writer.write(frame)
    for heard in (path, tmp_path / "out.mp4"):
        wave = media.read_audio(heard)
        assert 2.8 < len(wave) / 16000 < 3.2 and wave[-8000:-3000].std() > 0.01


def test_a_sound_with_holes_of_no_number_is_heard_and_written(tmp_path):
    wave = np.sin(np.arange(16000) / 10).astype(np.float32)
    wave[8000:8100] = np.nan
    soundfile.write(tmp_path / "holes.wav", wave, 16000, subtype="FLOAT")
    with media.VideoWriter(tmp_path / "out.mp4", tmp_path / "holes.wav", seconds=1) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    for heard in (tmp_path / "holes.wav", tmp_path / "out.mp4"):
        assert media.read_audio(heard)[:7000].std() == pytest.approx(wave[:7000].std(), rel=0.1)


def test_two_voices_of_which_each_has_a_channel_are_both_heard(tmp_path):
    wave, rng = np.zeros((32000, 2), np.float32), np.random.default_rng(0)
    wave[:16000, 0], wave[16000:, 1] = rng.normal(0, 0.1, 16000), rng.normal(0, 0.03, 16000)
    soundfile.write(tmp_path / "interview.wav", wave, 16000)
    heard = media.read_audio(tmp_path / "interview.wav").reshape(2, -1).std(1)
    assert heard[1] / heard[0] == pytest.approx(0.3, rel=0.1)


def test_a_voice_is_as_loud_wherever_the_channels_carry_it(people, tmp_path):
    mono = tmp_path / "mono.wav"
    ffmpeg("-i", people / "a.wav", "-ac", 1, "-ar", 48000, mono)
    level = lambda path: 20 * math.log10(np.sqrt((media.read_audio(path) ** 2).mean()))
    expected = level(mono)
    for name, pan in (("opposite", "stereo|c0=c0|c1=-1*c0"), ("twice", "stereo|c0=c0|c1=c0"),
                      ("left", "stereo|c0=c0"), ("centre", "5.1|FC=c0"), ("wide", "7.1|FC=c0")):
        ffmpeg("-i", mono, "-af", f"pan={pan}", tmp_path / f"{name}.wav")
        assert abs(level(tmp_path / f"{name}.wav") - expected) < 1, name


def test_the_default_track_is_heard_not_the_first(people, tmp_path):
    ffmpeg("-i", people / "a.mp4", "-f", "lavfi", "-i", "anullsrc=r=48000", "-i", people / "a.wav",
           "-map", "0:v", "-map", "1:a", "-map", "2:a", "-t", 1.5, "-c:v", "copy", "-c:a", "aac",
           "-disposition:a:0", 0, "-disposition:a:1", "default", tmp_path / "tracks.mp4")
    assert np.abs(media.read_audio(tmp_path / "tracks.mp4")).max() > 0.05


def test_the_output_carries_the_given_sound_at_its_own_rate_and_in_stereo(dubbing, networks,
                                                                          tmp_path):
    ffmpeg("-i", dubbing / "short.wav", "-af", "pan=stereo|c0=c0|c1=0.25*c0", "-ar", 44100,
           tmp_path / "stereo.wav")
    infer.dub(dubbing / "clip.mp4", tmp_path / "stereo.wav", tmp_path / "out.mp4", networks)
    log = subprocess.run([media.ffmpeg_exe(), "-i", tmp_path / "out.mp4"], stderr=subprocess.PIPE,
                         text=True).stderr
    assert "44100 Hz, stereo" in log, log


@pytest.mark.parametrize("name, words",
                         (("a.ts", ("-c:v", "libx264", "-g", 250)),
                          ("a.m2ts", ("-c:v", "libx264", "-g", 13, "-bf", 2)),
                          ("raw.h264", ("-c:v", "libx264", "-f", "h264")),
                          ("slow.mp4", ("-vf", "fps=1/2", "-r", 0.5, "-c:v", "libx264"))))
def test_files_that_cannot_be_sought_in_are_dubbed(name, words, dubbing, networks, tmp_path):
    ffmpeg("-i", dubbing / "clip.mp4", "-an", *words, "-preset", "ultrafast", tmp_path / name)
    report = infer.dub(tmp_path / name, dubbing / "long.wav", tmp_path / "out.mp4", networks)
    assert report["frames"] == 125 and report["kept"] == 0


def test_a_damaged_stream_is_dubbed(dubbing, networks, tmp_path):
    content = bytearray((dubbing / "clip.mp4").read_bytes())
    rng = np.random.default_rng(3)
    for at in range(len(content) // 3, 2 * len(content) // 3, 400):
        content[at:at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
    (tmp_path / "damaged.mp4").write_bytes(content)
    assert infer.dub(tmp_path / "damaged.mp4", dubbing / "long.wav", tmp_path / "out.mp4",
                     networks)["frames"] == 125


def test_pictures_are_told_by_content_and_animated_ones_move(people, tmp_path):
    ffmpeg("-i", people / "a.mp4", "-frames:v", 1, tmp_path / "face.jpg")
    shutil.copy(tmp_path / "face.jpg", tmp_path / "named.png")
    shutil.copy(people / "a.mp4", tmp_path / "video.png")
    ffmpeg("-i", people / "a.mp4", "-t", 1, "-vf", "fps=10", "-plays", 0, "-f", "apng",
           tmp_path / "moving.png")
    ffmpeg("-i", people / "a.mp4", "-t", 1, "-vf", "fps=10", "-c:v", "libwebp_anim", "-loop", 0,
           tmp_path / "moving.webp")
    assert [len(frames_of(tmp_path / name))
            for name in ("face.jpg", "named.png", "video.png")] == [1, 1, 75]
    assert all(len(frames_of(tmp_path / name)) >= 20 for name in ("moving.png", "moving.webp"))


def test_digital_silence_is_said_and_dubbed(dubbing, networks, tmp_path, capsys):
    soundfile.write(tmp_path / "silence.wav", np.zeros(9600), 16000)
    assert infer.dub(dubbing / "clip.mp4", tmp_path / "silence.wav", tmp_path / "out.mp4",
                     networks)["frames"] == 15
    assert capsys.readouterr().err.count("digital silence") == 1


def test_long_names_links_pipes_and_closed_streams(dubbing, tmp_path):
    long = tmp_path / ("n" * 251 + ".mp4")
    words = [sys.executable, HERE / "infer.py", dubbing / "clip.mp4", dubbing / "short.wav",
             "--weights", dubbing / "tiny.pt", "--out"]
    result = subprocess.run([*map(str, words), long], capture_output=True, text=True)
    assert result.returncode == 0 and long.is_file(), result.stderr
    link, real = tmp_path / "link.mp4", tmp_path / "real.mp4"
    link.symlink_to(real)
    shell = " ".join(f"'{word}'" for word in words)
    assert subprocess.run(f"{shell} '{link}' 2>&-", shell=True).returncode == 0
    assert link.is_symlink()
    assert real.is_file()
    real.unlink()
    odd = os.fsencode(tmp_path) + b"/\xff.mp4"
    assert subprocess.run([*map(str, words), odd], stdout=subprocess.DEVNULL).returncode == 0
    assert os.path.isfile(odd)
    pipe = subprocess.run(
        f"cat '{dubbing / 'short.wav'}' | "
        f"{shell.replace(str(dubbing / 'short.wav'), '/dev/stdin')} '{real}'",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert pipe.returncode == 2 and "not a regular file" in pipe.stderr
    assert len(os.fsencode(infer.default_name("x" * 250 + ".mp4"))) <= 255
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["link.mp4", long.name, os.fsdecode(b"\xff.mp4")]
    )


def test_texts_of_every_kind_are_read_and_bad_ones_skipped(tmp_path, capsys):
    video = tmp_path / "v.mp4"
    for name, content, words in (
            ("v.align", b"0 25000 sil\n25000 50000 bin\n", ["bin"]),
            ("v.align", b"start end word\n0.00 0.52 hello\n0.52 1.1 world\n", ["hello", "world"]),
            ("v.align", "0 25000 bin\n".encode("utf-16"), ["bin"]),
            ("v.txt", "hello you".encode("utf-16-le"), ["hello you"]),
            ("v.txt", b"Text:  MU MA\nConf:  4\n", ["MU MA"]),
            ("v.txt", "\ufeffhello  you\n".encode(), ["hello you"]),
            ("v.txt", "hello you".encode("utf-16"), ["hello you"]),
            ("v.txt", b"Text:  MU MA\nConf:  4\n\nWORD START END ASDSCORE\nMU 0.10 0.32 5.2\nMA "
                      b"0.32 0.61 6.1\n", ["MU", "MA"])):
        (tmp_path / name).write_bytes(content)
        assert [word for *_, word in data.read_text(video)] == words, content
        (tmp_path / name).unlink()
    assert data.read_text(video) == []
    (tmp_path / "v.align").write_bytes(b"0.5 1 a\n1 2 b\n")
    assert data.read_text(video)[1] == (1, 2, "b")  # seconds, as the line above
    (tmp_path / "v.align").write_bytes(b"nothing that one could read here\n")
    assert data.read_text(video) == [] and "v.align" in capsys.readouterr().out


def test_the_report_names_refused_files_and_counts_what_was_not_looked_at(demo, tmp_path):
    ffmpeg("-i", sorted(demo.glob("*.mp4"))[0], "-t", 0.5, "-c", "copy", tmp_path / "short.mp4")
    (tmp_path / "broken.divx").write_text("no video")
    # a name that is no text, and nothing in it
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).touch()
    (tmp_path / "notes.doc").write_text("x")
    result = command("data.py", "--data", tmp_path, "--workers", 1)
    assert "1 refused: shorter than 1 s (short.mp4)" in result.stdout
    assert "2 refused: unreadable file (broken.divx, " in result.stdout
    assert "1 files of other kinds were not looked at (notes.doc)" in result.stdout
    result = command("data.py", "--data", tmp_path / "short.mp4")
    assert result.returncode == 2 and "is a file: give its folder" in result.stderr

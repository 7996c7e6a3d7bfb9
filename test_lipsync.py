"""Every claim of the README and every contract, as a lesson in the order of the files: network, losses, experts, data,
training, dubbing. Drawn speakers only, no network. `pytest` runs it in about five minutes on two cores.
"""
import csv
import dataclasses
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

import data
import experts
import infer
import lipsync
import losses
import train
from bench import drawn, evaluate
from lipsync import AudioSelector, Config, ImageEncoder, LipSync, ModalityFusion, SPADE, check

HERE = pathlib.Path(__file__).parent
B, S, R, F, D = 2, 3, 4, 5, 24                   # all different, so that swapped axes cannot hide
SMALL = Config(image_size=64, refs=R, audio_encoder="scratch", audio_dim=D, window=F, decoder="spade", fold=1,
               channels=(5, 10, 15, 20, 25, 40), heads=2, spade_hidden=6)
CONV = dataclasses.replace(SMALL, decoder="conv", fold=2, channels=(10, 15, 20, 25, 40))


def command(*words, timeout=300, **options):
    """Runs one of our commands as a user does."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True, text=True, timeout=timeout, **options)


def inputs(config, batch=B):
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
    with lipsync.trace() as rows, torch.no_grad():
        net(*inputs(CONV))
    assert ("lipsync.refs", "B R 3 H W", (B, R, 3, 64, 64)) in rows and rows[-1] == ("decoder.picture", "B 3 H W", (B, 3, 64, 64))
    before = len(rows)
    net(*inputs(CONV))
    assert len(rows) == before


def test_python_lipsync_prints_shapes_parameters_and_macs():
    out = command("lipsync.py", "--preset", "edge").stdout
    assert "1 3 3 256 256" in out and "1 11 512" in out
    net = LipSync(lipsync.PRESETS["edge"])
    count = sum(p.numel() for p in net.parameters()) + sum(p.numel() for p in lipsync.ScratchEncoder(512).parameters())
    assert out.splitlines()[-1].split()[:2] == ["sum", f"{count:,}"]


def test_every_class_and_function_says_what_is_the_patents_and_what_is_ours():
    import inspect
    for module in (lipsync, losses):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") != module.__name__ or name in ("main", "example"):
                continue
            if inspect.isclass(thing) and issubclass(thing, torch.nn.Module) or inspect.isfunction(thing) and name in (
                    "log_mel in_windows encode_batch build_audio_encoder half_mask audio_window attention position_code "
                    "cosine sync_loss lip_reading_loss reconstruction_loss discriminator_loss generator_loss").split():
                assert "Shapes:" in thing.__doc__ and ("Patent:" in thing.__doc__ or "Choice:" in thing.__doc__), name
            elif inspect.isfunction(thing) and not name.startswith("_"):
                assert thing.__doc__, name


# ---------------------------------------------------------------- S2(1) audio encoders
def test_scratch_encoder_gives_25_features_a_second_that_hear_only_their_neighbourhood():
    encoder = lipsync.ScratchEncoder(D).eval()
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
    return lipsync.WhisperEncoder(dims)


def test_a_whisper_that_hears_other_mel_bands_is_refused():
    with pytest.raises(lipsync.BadInput, match="128 mel bands"):     # large-v3
        lipsync.WhisperEncoder(dict(n_mels=128, n_audio_ctx=1500, n_audio_state=D, n_audio_head=2, n_audio_layer=4))


def test_whisper_encoder_costs_what_the_sound_is_long_and_stays_frozen():
    encoder = small_whisper()
    encoder.train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    features = encoder(torch.rand(2, 48000) - 0.5)
    assert features.shape == (2, 75, D) and not features.requires_grad


def test_long_sound_is_encoded_in_windows_whose_seams_are_blended():
    seconds = 95
    wave = torch.linspace(-1, 1, seconds * 16000)
    plain = lambda piece: piece.unflatten(0, (-1, 640)).mean(1, keepdim=True)    # a feature that knows no window
    whole = lipsync.in_windows(plain, wave)
    assert whole.shape == (seconds * 25, 1) and torch.allclose(whole, plain(wave), atol=1e-5)
    lengths = []
    lipsync.in_windows(lambda piece: (lengths.append(len(piece)), plain(piece))[1], wave)
    assert max(lengths) == 30 * 16000
    stepped = iter(range(100))
    ramp = lipsync.in_windows(lambda piece: torch.full((len(piece) // 640, 1), float(next(stepped))), wave)
    assert (ramp[1:] - ramp[:-1]).abs().max() < 0.01          # window 0 fades into window 1: never a step


def test_features_beside_a_seam_are_those_of_a_window_centred_there():
    encoder, seconds = small_whisper(), 95
    wave = torch.sin(torch.arange(seconds * 16000) * 0.05 * (1 + torch.sin(torch.arange(seconds * 16000) / 3000))) * 0.5
    features = encoder(wave[None])[0]
    for seam in (30, 60, 80):
        centred = encoder(wave[None, (seam - 15) * 16000:(seam + 15) * 16000])[0]            # [750, D]
        near, there = features[(seam - 10) * 25:(seam + 10) * 25], centred[125:625]
        assert fn.cosine_similarity(near, there, dim=1).min() >= 0.95


@pytest.mark.parametrize("text, expected", [
    ("base", ("whisper", "base")), ("whisper", ("whisper", "base")), ("whisper:tiny", ("whisper", "tiny")),
    ("scratch", ("scratch", "")), ("hubert", ("hubert", "facebook/hubert-base-ls960")),
    ("facebook/wav2vec2-base", ("wav2vec2", "facebook/wav2vec2-base"))])
def test_audio_encoder_names_are_understood(text, expected):
    assert lipsync.parse_audio_encoder(text) == expected


def test_whisper_loads_from_full_and_encoder_only_files_and_a_missing_one_says_what_to_do(tmp_path):
    encoder = small_whisper()
    state = {f"encoder.{k}": v for k, v in encoder.encoder.state_dict().items()}
    wave = torch.rand(1, 16000) - 0.5
    for name, extra in (("encoder", {}), ("full", {"decoder.token_embedding.weight": torch.zeros(2, 2)})):
        path = tmp_path / f"{name}.pt"
        torch.save({"dims": encoder.dims, "model_state_dict": {**state, **extra}}, path)
        again = lipsync.build_audio_encoder(Config(audio_encoder=str(path)))
        assert torch.equal(again(wave), encoder(wave))
    (tmp_path / "wrong.pt").write_text("no weights")
    with pytest.raises(lipsync.BadInput, match="--audio-encoder scratch"):
        lipsync.build_audio_encoder(Config(audio_encoder=str(tmp_path / "wrong.pt")))


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(lipsync.BadInput, match="pip install transformers"):
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
    assert some[0, 1, :, 0].tolist() == [7, 8, 9, 9, 9] and some[1, 0, :, 0].tolist() == [0, 0, 0, 1, 2]


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
    fusion.norm_look.register_forward_hook(lambda _, __, out: looked.append(out))
    fusion(image, audio)
    looked[0].square().sum().backward()
    assert (image.grad[:, :, :2] == 0).all() and (image.grad[:, :, 2:] != 0).any(1).all()


def test_amplitude_is_not_normalised_away_and_a_batch_equals_a_loop():
    for config in (SMALL, CONV):
        net, (refs, masked, audio) = LipSync(config).eval(), inputs(config)
        with torch.no_grad():
            outputs = {a: net(refs, masked, audio, a) for a in (0.5, 1.0, 1.5)}
            assert (outputs[0.5] - outputs[1.0]).abs().max() > 1e-5 < (outputs[1.5] - outputs[1.0]).abs().max()
            both = net(refs, masked, audio, torch.tensor([0.5, 1.5]))
        assert torch.allclose(both, torch.stack([outputs[0.5][0], outputs[1.5][1]]), atol=1e-5)


# ---------------------------------------------------------------- S2(5) decoder
def test_spade_with_zero_gamma_and_beta_is_its_plain_norm():
    spade, x, map = SPADE(6, 4, 5), torch.randn(B, 6, 7, 9), torch.randn(B, 4, 7, 9)
    for conv in (spade.gamma, spade.beta):
        torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
    assert torch.allclose(spade(x, map), fn.instance_norm(x), atol=1e-6)


def test_decoder_upsamples_five_times_and_ends_in_a_sigmoid():
    net = LipSync(dataclasses.replace(SMALL, copy=False)).eval()
    assert len(net.decoder.blocks) == 5
    with torch.no_grad():
        net.decoder.out.bias.fill_(50)
        assert (net(*inputs(SMALL))[:, :, 32:] == 1).all()


def test_a_silent_decoder_leaves_the_draft_which_is_made_of_reference_pixels():
    net, (refs, masked, audio) = LipSync(CONV).eval(), inputs(CONV)
    for conv in (net.decoder.out, net.decoder.copy.conv):
        torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
    with torch.no_grad():
        output = net(refs, masked, audio)
    assert torch.allclose(output[:, :, 32:], refs.mean(1)[:, :, 32:].clamp(1 / 255, 254 / 255), atol=1e-4)


@pytest.mark.parametrize("preset", ("edge", "tiny"))
def test_the_draft_is_warped_by_all_rows_of_the_map_that_show_the_lower_half_and_no_others(preset):
    net, maps = LipSync(dataclasses.replace(lipsync.PRESETS[preset], audio_dim=8)).eval(), {}
    net.decoder.blocks[net.decoder.copy_at].register_forward_hook(lambda block, given, made: maps.update(made=made))
    net.decoder.copy.register_forward_hook(lambda copy, given, made: maps.update(given=given[0]))
    with torch.no_grad():
        net(*(x[:1] for x in lipsync.example(net.config)))
    rows = maps["made"].shape[2]                                     # the lower 5/8 of the map: 4/8 are the lower half
    assert maps["made"].shape[3] == net.config.image_size // 2 == rows * 8 // 5
    assert torch.equal(maps["given"], maps["made"][:, :, rows // 5:])


# ---------------------------------------------------------------- S2 the whole network
@pytest.mark.parametrize("config", (SMALL, CONV), ids=("spade", "conv"))
def test_output_depends_on_sound_references_and_upper_half_but_never_on_the_hidden_lower_half(config):
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
    net = LipSync(config)
    net(*inputs(config)).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert all(name.endswith("key.bias") for name in silent), silent       # softmax does not see a key's bias
    checkpointed = LipSync(dataclasses.replace(config, checkpointing=True))
    checkpointed.load_state_dict(net.state_dict())
    checkpointed(*inputs(config)).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), checkpointed.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_wrong_inputs_are_refused_by_name():
    net, (refs, masked, audio) = LipSync(CONV), inputs(CONV)
    image, skips = net.image_encoder(refs, masked)
    for name, call in {
            "lipsync.refs": lambda: net(refs[:, :3], masked, audio),
            "lipsync.masked": lambda: net(refs, masked[:1], audio),
            "lipsync.audio": lambda: net(refs, masked, audio[:, :4]),
            "image.refs": lambda: net.image_encoder(refs * 255, masked),
            "image.masked": lambda: net.image_encoder(refs, masked - 1),
            "fusion.image": lambda: net.fusion(image[:, :3], audio),
            "fusion.audio": lambda: net.fusion(image, audio[..., :3]),
            "fusion.amplitude": lambda: net.fusion(image, audio, -1.0),
            "selector.features": lambda: AudioSelector(CONV)(audio[0]),
            "image.stage_in": lambda: net.image_encoder.stages[0](image),
            "fusion.attention_to": lambda: net.fusion.look(image.flatten(2).mT, audio),
            "decoder.masked": lambda: net.decoder(image, skips, refs, masked[:, :, 2:]),
            "decoder.copy_in": lambda: net.decoder.copy(image[:, :7], refs),
            "decoder.copy_refs": lambda: net.decoder.copy(image[:, :15], refs[:, :3]),
            "decoder.fused": lambda: net.decoder(image[:, :3], skips, refs, masked),
            "decoder.spade_map": lambda: SPADE(4, 3, 2)(torch.zeros(1, 4, 5, 6), torch.zeros(1, 3, 6, 5)),
            "audio.wave": lambda: lipsync.ScratchEncoder(4)(torch.full((1, 16000), 300.0))}.items():
        with pytest.raises(ValueError, match=name):
            call()
    for wrong in (dict(refs=9), dict(window=4), dict(decoder="gan"), dict(image_size=100), dict(channels=(8, 8))):
        with pytest.raises(ValueError, match="Config"):
            dataclasses.replace(CONV, **wrong)


def test_bfloat16_weights_draw_nearly_the_same_picture():
    for config in (SMALL, CONV):
        net = LipSync(config).eval()
        with torch.no_grad():
            exact = net(*inputs(config))
            rough = net.to(torch.bfloat16)(*inputs(config))
        assert rough.dtype == torch.float32 and (exact - rough).abs().max() < 0.03


def test_network_compiles_as_one_graph_and_exports_with_a_free_batch(tmp_path):
    for config in (SMALL, CONV):
        net = LipSync(config).eval()
        with torch.no_grad():
            expected = net(*inputs(config))
            compiled = torch.compile(net, fullgraph=True, backend="eager")
            assert torch.allclose(compiled(*inputs(config)), expected, atol=1e-4)
    file = tmp_path / "net.pt2"
    assert command("lipsync.py", "--preset", "tiny", "--export", file).returncode == 0
    code = (f"import torch, lipsync; p = torch.export.load({str(file)!r}).module();"
            "x = lipsync.example(lipsync.PRESETS['tiny'], 3); torch.manual_seed(0); net = lipsync.LipSync(lipsync.PRESETS['tiny']).eval();"
            "a = torch.tensor([0.5, 1, 2]); print((p(*x, a) - net(*x, a)).abs().max().item() < 1e-4)")
    result = command("-c", code)
    assert result.stdout.strip() == "True", result.stderr


# ---------------------------------------------------------------- S3 losses
def test_sync_loss_of_three_four_against_four_three_is_minus_log_of_24_over_25():
    audio, video = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert losses.sync_loss(audio, video).item() == pytest.approx(-math.log(24 / 25), abs=1e-6)
    assert losses.sync_loss(audio, video, 0.0).item() == pytest.approx(-math.log(1 / 25), abs=1e-4)


def test_sync_loss_averages_rows_with_labels_of_their_own():
    audio, video = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [4.0, 3.0]])
    expected = (-math.log(0.96) - math.log(0.04)) / 2
    assert losses.sync_loss(audio, video, torch.tensor([1.0, 0.0])).item() == pytest.approx(expected, abs=1e-4)


def test_sync_loss_stays_finite_for_zero_equal_and_orthogonal_embeddings():
    zero, one, other = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0]] * 2), torch.tensor([[0, 1.0, 0]] * 2)
    for audio, video, label in ((zero, one, 1), (zero, zero, 1), (one, one, 0), (one, other, 1), (one, one, 1)):
        video = video.clone().requires_grad_()
        loss = losses.sync_loss(audio, video, label)
        loss.backward()
        assert 0 <= loss.item() < 13.9 and video.grad.isfinite().all()


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
    assert losses.lip_reading_loss(logits, tokens, pad=6).item() == pytest.approx(math.log(7), abs=1e-6)


def test_lip_reading_loss_weighs_tokens_alike_and_ignores_padding():
    logits, tokens = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 4]])
    logits[0, :, :] = 0
    logits[1, 0, 3] = math.log(4)                 # P = 4 / (4 + 4) = 1/2
    logits[1, 1:] = torch.randn(2, 5) * 100       # padding: anything
    assert losses.lip_reading_loss(logits, tokens, pad=4).item() == pytest.approx((3 * math.log(5) + math.log(2)) / 4, abs=1e-5)


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
    net = losses.PerceptualLoss("random", layers=(1, 6))
    output, target = torch.rand(1, 3, 64, 96), torch.rand(1, 3, 64, 96)
    expected = 0
    for step in (1, 2, 4):
        a, b = (fn.avg_pool2d(x, step) for x in (output, target))
        a, b = ((x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None] for x in (a, b))
        for stop in (2, 7):
            u, v = net.vgg[:stop](a), net.vgg[:stop](b)
            _, C, H, W = u.shape
            expected += ((u - v).abs().sum() / (W * H * C)).item()
    assert net(output, target).item() == pytest.approx(expected, rel=1e-5)
    assert net(target, target).item() == 0


def test_perceptual_loss_is_frozen_and_its_gradient_reaches_the_output_only():
    net = losses.PerceptualLoss("random", layers=(1, 6)).train()
    assert not any(module.training for module in net.modules())
    output, target = torch.rand(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64, requires_grad=True)
    net(output, target).backward()
    assert output.grad.abs().sum() > 0 and target.grad is None and all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_random_vgg_is_the_same_everywhere_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = losses.PerceptualLoss("random", layers=(1,)), losses.PerceptualLoss("random", layers=(1,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vgg[0].weight, second.vgg[0].weight)


def test_vgg_weights_come_from_a_file_and_a_foreign_file_is_refused(tmp_path):
    state = {f"features.{name}": value + 1 for name, value in losses.load_vgg("random").state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    assert torch.equal(losses.PerceptualLoss(str(tmp_path / "vgg.pth")).vgg[0].bias, torch.ones(64))
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"x": 1}, tmp_path / "other.pth")
    for name, words in (("text.pth", "not VGG-19"), ("other.pth", "not VGG-19"), ("missing.pth", "cannot be read")):
        with pytest.raises(lipsync.BadInput, match=words) as caught:
            losses.PerceptualLoss(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_imagenet_weights_without_a_network_name_the_remedy(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(lipsync.BadInput, match="--vgg FILE") as caught:
        losses.PerceptualLoss("imagenet")
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
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_gan_losses_equal_the_patents_logs_where_those_are_finite():
    real, fake = [torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 2)], [torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 2)]
    D = torch.sigmoid
    disc = sum((1 - D(f)).log().mean() + D(r).log().mean() for r, f in zip(real, fake)) / 2
    gen = sum((1 - D(f)).log().mean() for f in fake) / 2
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(-disc.item(), rel=1e-5)
    assert losses.generator_loss(fake, "patent").item() == pytest.approx(gen.item(), rel=1e-5)
    assert losses.generator_loss(fake).item() == pytest.approx(-sum(D(f).log().mean() for f in fake).item() / 2, rel=1e-5)


def test_gan_losses_stay_finite_where_the_patents_logs_do_not():
    real, fake = [torch.tensor([[[[-200.0]]]])], [torch.tensor([[[[200.0]]]])]
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(400)
    assert losses.generator_loss(fake, "patent").item() == pytest.approx(-200)
    with pytest.raises(ValueError, match="form"):
        losses.generator_loss(fake, "wasserstein")


# ---------------------------------------------------------------- experts
@pytest.mark.parametrize("audio, sound", [("features", (3, 5, 24)), ("mel", (3, 80, 20))])
def test_sync_expert_embeddings_are_never_negative_and_fit_the_sync_loss(audio, sound):
    net = experts.SyncXNet("small", audio, audio_dim=24).eval()
    video, heard = net.embed_video(torch.rand(3, 5, 3, 128, 256)), net.embed_audio(torch.randn(sound))
    assert video.shape == heard.shape and video.min() >= 0 and heard.min() >= 0
    assert losses.sync_loss(heard, video).isfinite()


def test_a_frozen_sync_expert_passes_the_gradient_on_to_the_pictures():
    net, pictures = experts.SyncXNet("small", audio_dim=24).eval().requires_grad_(False), torch.rand(2, 5, 3, 128, 256, requires_grad=True)
    losses.sync_loss(net.embed_audio(torch.randn(2, 5, 24)), net.embed_video(pictures)).backward()
    assert (pictures.grad.abs().sum((0, 2, 3, 4)) > 0).all()      # every one of the five frames


def test_small_experts_keep_to_their_budget():
    assert sum(p.numel() for p in experts.SyncXNet("small").parameters()) <= 1.5e6
    assert sum(p.numel() for p in experts.LipReader("small").parameters()) <= 2e6


def test_full_sync_expert_is_a_resnext_with_fifteen_input_planes():
    net = experts.SyncXNet("full", audio_dim=24).eval()
    assert net.video.conv1.in_channels == 15
    with torch.no_grad():
        assert net.embed_video(torch.rand(1, 5, 3, 64, 128)).shape == net.embed_audio(torch.randn(1, 5, 24)).shape


def test_mouth_view_averages_pixel_pairs_and_leaves_a_view_alone():
    pictures = torch.rand(2, 3, 3, 128, 256)
    view = experts.mouth_view(pictures, 40)
    assert torch.allclose(view[1, 2, 0, 0, 0], pictures[1, 2, 0, 8:10, 48:50].mean())
    assert experts.mouth_view(view, 40) is view


def test_sync_curve_finds_how_late_the_sound_is():
    vectors = torch.rand(40, 16)
    for late in (-7, 0, 4):
        sound = torch.rand(40, 16)
        lo, hi = max(0, late), 40 + min(0, late)
        sound[lo:hi] = vectors[lo - late:hi - late]               # what the lips do at i is heard at i + late
        curve = experts.sync_curve(vectors, sound)
        offset, distance, confidence = experts.read_curve(curve)
        assert offset == late and distance == pytest.approx(0, abs=1e-3)
        assert confidence == pytest.approx(float(curve.nanmedian()), abs=1e-3)


def test_sync_curve_ignores_frames_without_a_face():
    vectors, valid = torch.rand(40, 16), torch.ones(40, dtype=torch.bool)
    lips = vectors.clone()
    lips[10:20], valid[10:20] = torch.rand(10, 16), False
    assert experts.sync_curve(lips, vectors, valid)[experts.MAX_SHIFT].item() == pytest.approx(0, abs=1e-3)


class Twins(torch.nn.Module):
    """A sync expert that knows: the embedding is the first frame's first pixel / first feature, as a one-hot."""

    def __init__(self):
        super().__init__()
        self.arch, self.anchor = dict(size="small", audio="features"), torch.nn.Parameter(torch.zeros(1))

    def embed_video(self, pictures):
        return fn.one_hot((pictures[:, 0, 0, 0, 0] * 255).round().long(), 256).float()

    def embed_audio(self, sound):
        return fn.one_hot(sound[:, 0, 0].round().long(), 256).float()


def test_measure_offset_reports_late_sound_as_positive():
    pictures = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 4, 8)
    for late in (-3, 0, 6):
        result = experts.measure_offset(Twins(), pictures, (torch.arange(62.0) - late).clamp(0, 255)[:, None].expand(62, 2))
        assert result["offset"] == late and result["distance"] == pytest.approx(0, abs=1e-3)
        assert result["confidence"] == pytest.approx(2**0.5, abs=1e-3) and len(result["curve"]) == 31


def test_measure_offset_manages_with_few_frames_that_show_a_face():
    pictures, found = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 4, 8), torch.arange(60) < 10
    result = experts.measure_offset(Twins(), pictures, (torch.arange(60.0) - 2).clamp(0, 255)[:, None].expand(60, 2), found.numpy())
    assert result["offset"] == 2 and result["distance"] == pytest.approx(0, abs=1e-3)


def test_measure_offset_says_when_there_is_nothing_to_measure():
    for frames, found in ((3, None), (20, torch.arange(20) % 3 > 0)):
        with pytest.raises(lipsync.BadInput, match="nothing to measure"):
            experts.measure_offset(Twins(), torch.zeros(frames, 3, 4, 8), torch.zeros(frames, 2), found)


def test_an_opening_that_follows_the_voice_correlates_with_it_and_rests_in_pauses():
    voice = np.repeat([0.3, 0, 0.3, 0], 25)                          # a second of voice, a second of silence, twice
    wave = np.repeat(voice, lipsync.SAMPLES_PER_FRAME)
    found = np.arange(100) != 3
    result = experts.measure_opening(np.where(found, 1 + 30 * voice, 12), wave, found)
    assert result["r_loudness"] > 0.95 and result["opening_pause"] == 1 and 8 < result["opening_speech"] <= 10
    late = experts.measure_opening(1 + 30 * np.roll(voice, 25), wave, found)
    assert late["r_loudness"] < -0.9 and late["opening_pause"] > 9


def test_sync_accuracy_counts_true_pairs_and_sounds_without_a_common_frame_alike():
    assert experts.sync_accuracy(torch.eye(16), torch.eye(16)) == 1 and experts.sync_accuracy(torch.eye(16), torch.eye(16).flip(0)) < 0.5
    assert experts.sync_accuracy(torch.ones(16, 4), torch.ones(16, 4)) == 0.5          # says yes to everything
    video, audio = torch.eye(40), torch.eye(40)
    audio[:, 5] += 3 * (torch.arange(40) == 20)                   # one confused moment, which a second's mean outvotes
    assert experts.sync_accuracy(video, audio) < experts.sync_accuracy(video, audio, 20) == 1


def test_added_noise_is_as_far_below_the_speech_as_it_says():
    wave = np.sin(np.arange(16000) / 9).astype(np.float32)
    for exponent in (0, 1):
        noise = data.add_noise(wave, 10, np.random.default_rng(0), exponent) - wave
        assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.1)


def test_sync_expert_learns_which_feature_belongs_to_which_mouth():
    torch.manual_seed(0)
    net = experts.SyncXNet("small", audio_dim=8).train()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    history = []
    for _ in range(20):
        opening = torch.rand(16, 3)                               # one true and two false openings per row
        rows = torch.arange(40)[:, None] < 40 * opening[:, 0, None, None, None, None]            # [16, 1, 1, 40, 1] the mouth's height
        pictures = rows.float().expand(16, 5, 3, 40, 80) * 0.8 + 0.1 * torch.rand(16, 5, 3, 40, 80)
        sound = torch.cat([opening[..., None], 1 - opening[..., None]], -1).repeat(1, 1, 4)[:, :, None].expand(16, 3, 5, 8)
        loss, accuracy = experts.sync_batch_loss(net, pictures, sound[:, 0], sound[:, 1:])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        history.append(loss.item())
    assert history[0] > 1.7 > 1.5 > np.mean(history[-5:])       # ln 2 + ln 3 = 1.79 is the loss of one who guesses


def test_text_survives_encoding_in_any_language():
    for text in ("", "set blue at f two now", "你好，世界 日本語 é"):
        tokens = data.encode_text(text)
        assert tokens[-1] == data.EOS and data.decode_tokens(tokens + [data.PAD] * 3) == text


@pytest.mark.parametrize("read, truth, rate", [("kitten", "sitting", 3 / 7), ("", "abc", 1), ("abc", "abc", 0), ("ab", "", 2)])
def test_character_error_rate_counts_edits_per_true_character(read, truth, rate):
    assert experts.character_error_rate(read, truth) == pytest.approx(rate)


def test_lip_reader_never_looks_at_the_token_it_must_guess():
    net = experts.LipReader("small").eval()
    video, tokens = torch.rand(2, 9, 3, 40, 80), torch.randint(0, 256, (2, 6))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 256
    with torch.no_grad():
        changed = (net(video, tokens) - net(video, other)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 2


def test_lip_reader_ignores_the_padding_of_short_clips():
    net = experts.LipReader("small").eval()
    video, tokens = torch.rand(1, 9, 3, 40, 80), torch.randint(0, 256, (1, 4))
    padded = torch.cat([video, torch.rand(1, 5, 3, 40, 80)], 1)
    with torch.no_grad():
        assert torch.allclose(net(video, tokens), net(padded, tokens, torch.tensor([9])), atol=1e-4)
        assert torch.allclose(net.ctc(video), net.ctc(padded, torch.tensor([9]))[:, :9], atol=1e-4)


def test_gradient_of_the_lip_loss_reaches_every_frame_of_a_frozen_reader():
    net, video = experts.LipReader("small").eval().requires_grad_(False), torch.rand(2, 8, 3, 128, 256, requires_grad=True)
    losses.lip_reading_loss(net(video, torch.tensor([[65, 66, data.EOS], [67, data.EOS, data.PAD]])), torch.tensor(
        [[65, 66, data.EOS], [67, data.EOS, data.PAD]]), data.PAD).backward()
    assert (video.grad.abs().sum((2, 3, 4)) > 0).all()


def test_lip_reader_learns_two_clips_by_heart_and_reads_them():
    net = experts.LipReader("small").train()
    video, texts = torch.rand(2, 12, 3, 40, 80), ["ab", "né"]
    tokens = torch.tensor([data.encode_text(texts[0]) + [data.PAD], data.encode_text(texts[1])])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(40):
        loss = experts.lip_batch_loss(net, video, tokens)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    net.eval()
    assert net.read(video) == texts and net.read(video, beam=3) == texts
    own, foreign = (losses.lip_reading_loss(net(video, t), t, data.PAD) for t in (tokens, tokens.flip(0)))
    assert own < foreign


def test_experts_survive_a_checkpoint():
    for net in (experts.SyncXNet("small", "mel"), experts.LipReader("small")):
        again = experts.load_expert(experts.pack_expert(net))
        assert type(again) is type(net) and not again.training
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert experts.load_expert(experts.pack_expert(None)) is None


def test_corrupted_sound_keeps_its_length_range_and_timing():
    rng = np.random.default_rng(0)
    wave = np.zeros(16000, np.float32)
    wave[8000:8400] = np.sin(np.arange(400) / 5) * 0.3
    for _ in range(8):
        noisy = data.corrupt_sound(wave, rng)
        assert noisy.shape == wave.shape and noisy.dtype == np.float32 and np.abs(noisy).max() <= 1
        delays = [np.dot(noisy[8000 + d:8400 + d], wave[8000:8400]) for d in range(-300, 301)]
        assert abs(int(np.argmax(delays)) - 300) <= 2
    assert np.isfinite(data.corrupt_sound(np.zeros(1000, np.float32), rng)).all()


def test_jittered_pictures_stay_pictures_and_strength_zero_changes_nothing():
    pictures = torch.rand(2, 5, 3, 40, 80)
    jittered = experts.jitter_pictures(pictures)
    assert jittered.shape == pictures.shape and jittered.min() >= 0 and jittered.max() <= 1 and not torch.equal(jittered, pictures)
    assert torch.allclose(experts.jitter_pictures(pictures, 0.0), pictures, atol=1e-6)


# ---------------------------------------------------------------- data: the drawn corpus
@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A drawn corpus as `python data.py --demo` makes it: 6 clips of 3 speakers; with one more, it is prepared below."""
    folder = tmp_path_factory.mktemp("demo")
    result = command("data.py", "--demo", folder, "--clips", 6, "--speakers", 3, "--seed", 5)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def prepared(demo):
    """The same, prepared by `python data.py --data`."""
    result = command("data.py", "--data", demo)
    assert result.returncode == 0 and re.search(r"6 clips kept; [\d.]+ clips/s, [1-9]\d+ MiB a worker", result.stdout), result.stdout + result.stderr
    return demo


def truth(video):
    return np.genfromtxt(video.with_suffix(".csv"), delimiter=",", names=True)


def test_drawn_speakers_speak_their_text_and_differ(demo):
    videos = sorted(demo.glob("*.mp4"))
    assert len(videos) == 6 and all(v.with_suffix(".txt").read_text().split() for v in videos)
    firsts = [next(data.read_frames(v)) for v in videos[::2]]
    assert all(f.shape == (720, 1280, 3) for f in firsts)
    assert min(np.abs(a.astype(int) - b).mean() for a, b in zip(firsts, firsts[1:])) > 5


def test_the_same_seed_draws_the_same_clip(tmp_path):
    for name in ("a", "b"):
        drawn.draw_clip(tmp_path / f"{name}.mp4", drawn.Speaker.draw(4), seed=9, seconds=0.4)
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    frames = [np.stack(list(data.read_frames(tmp_path / f"{name}.mp4"))) for name in ("a", "b")]
    assert np.array_equal(*frames)


def test_mediapipe_sees_the_drawn_mouth_open_and_close_as_the_truth_says(prepared):
    for path in data.list_clips(prepared):
        clip = data.load_clip(path)
        assert clip.found.mean() >= 0.99
        assert np.corrcoef(clip.shapes[:, 0], truth(prepared / clip.source)["opening"])[0, 1] >= 0.95


# ---------------------------------------------------------------- data: preparing
def test_clips_are_upright_crops_with_the_mouth_in_the_lower_half(prepared):
    for path in data.list_clips(prepared):
        clip = data.load_clip(path)
        assert len(clip) == 125 and clip.frame(3).shape == (256, 256, 3) and clip.mel.shape == (80, 500) and len(clip.wave) == 80000
        assert clip.text == (prepared / clip.source).with_suffix(".txt").read_text().strip()
        assert (clip.landmarks[:, data.LIPS_OUTER, 1] > 128).all()
        eyes = clip.landmarks[:, 263] - clip.landmarks[:, 33]
        assert np.degrees(np.abs(np.arctan2(eyes[:, 1], eyes[:, 0]))).max() < 4


def test_a_second_run_does_only_what_is_new(prepared):
    before = {p: p.stat().st_mtime_ns for p in data.list_clips(prepared)}
    assert data.prepare(prepared)["new"] == 0
    assert {p: p.stat().st_mtime_ns for p in data.list_clips(prepared)} == before


def test_two_shards_equal_one_run(prepared, tmp_path):
    for video in prepared.glob("*_000.*"):
        shutil.copy(video, tmp_path)
    kept = sum(data.prepare(tmp_path, 1, (i, 2))["kept"] for i in (1, 2))
    assert kept == 3
    for path in data.list_clips(tmp_path):
        again, first = data.load_clip(path), data.load_clip(prepared / ".clips" / path.name)
        assert np.array_equal(again.jpegs, first.jpegs) and np.array_equal(again.wave, first.wave)


def ffmpeg(*words):
    subprocess.run([data.ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, words)], check=True)


def test_odd_videos_are_prepared_and_useless_ones_refused_with_their_reason(demo, tmp_path):
    source = sorted(demo.glob("*.mp4"))[0]
    sub = tmp_path / "sub folder" / "Ünï 'quoted' 名"
    sub.mkdir(parents=True)
    ffmpeg("-i", source, "-t", 2, "-r", "30000/1001", "-c:a", "libmp3lame", "-ar", 44100, "-ac", 2, sub / "fast %d.mkv")
    ffmpeg("-i", source, "-t", 1.5, "-vf", "scale=641:361", "-c:v", "mpeg4", "-q:v", 3, tmp_path / "odd size.avi")
    ffmpeg("-display_rotation", 90, "-i", source, "-t", 1.5, "-c", "copy", tmp_path / "rotated.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-an", "-c", "copy", tmp_path / "mute.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-af", "volume=0", "-c:v", "copy", tmp_path / "silent.mp4")
    ffmpeg("-i", source, "-t", 1.5, "-vf", "scale=214:120", tmp_path / "small.mp4")
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=320x240:d=1.5", "-f", "lavfi", "-i", "sine=d=1.5", tmp_path / "faceless.mp4")
    ffmpeg("-i", source, "-t", 0.5, tmp_path / "short.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[:30_000])
    report = data.prepare(tmp_path)
    kept = sorted(data.load_clip(p).source for p in data.list_clips(tmp_path))
    assert [pathlib.Path(k).name for k in kept if "rotated" not in k] == ["odd size.avi", "fast %d.mkv"]
    refused = report["refused"]
    assert refused["no sound track"] == refused["silent sound"] == refused["face smaller than 80 px"] == refused["shorter than 1 s"] == 1
    assert refused["unreadable file"] == 2 and refused["face missing in > 10 % of frames"] >= 1


@pytest.mark.parametrize("rate", (("-r", "30000/1001"), ("-vf", r"select=lt(mod(n\,5)\,4)", "-fps_mode", "vfr")), ids=("29.97", "variable"))
def test_sound_and_frames_stay_aligned_when_the_frame_rate_changes(rate, demo, tmp_path):
    source = sorted(demo.glob("*.mp4"))[1]
    ffmpeg("-i", source, *rate, "-c:a", "copy", tmp_path / "other.mkv")
    data.prepare(tmp_path, 1)
    clip, opening = data.load_clip(data.list_clips(tmp_path)[0]), truth(source)["opening"]
    assert abs(evaluate.lag_of(clip.shapes[:, 0], opening[:len(clip)])) == 0
    sound = data.read_audio(source)[:len(clip.wave)]
    delays = [np.dot(clip.wave[8000 + d:40000 + d].astype(np.float64), sound[8000:40000]) for d in range(-800, 801, 4)]
    assert abs(int(np.argmax(delays)) * 4 - 800) <= 640                 # one sample window: 40 ms


def test_a_killed_preparation_goes_on_where_it_was(demo, tmp_path):
    for i, source in enumerate(sorted(demo.glob("*.mp4"))[:3]):
        ffmpeg("-i", source, "-t", 1.4, "-c", "copy", tmp_path / f"{i}.mp4")
    process = subprocess.Popen([sys.executable, HERE / "data.py", "--data", tmp_path, "--workers", "1"], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list((tmp_path / ".clips").glob("*.json"))) >= 1:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in data.list_clips(tmp_path)}
    report = data.prepare(tmp_path, 1)
    assert report["kept"] == 3 and report["new"] < 3
    assert all(data.load_clip(p) for p in data.list_clips(tmp_path))
    assert any(p.stat().st_mtime_ns == t for p, t in finished.items())
    (tmp_path / "0.mp4").rename(tmp_path / "other.mp4")
    report = data.prepare(tmp_path, 1)
    assert (report["kept"], report["new"], report["orphans"]) == (3, 1, 1)


def test_yolo_boxes_are_decoded_and_doubles_suppressed():
    output = np.zeros((1, 20, 8400), np.float32)
    for anchor, row in ((5, (320, 200, 100, 80, 0.9)), (6, (322, 202, 100, 80, 0.8)), (70, (100, 500, 40, 60, 0.7)), (9, (50, 50, 9, 9, 0.2))):
        output[0, :5, anchor] = row
    output[0, 5:8, 5] = (300, 190, 1)
    boxes, scores, points = data.decode_yolo(output, scale=0.5, pad=(0, 140))
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert boxes[0].tolist() == pytest.approx([540, 40, 740, 200]) and boxes[1].tolist() == pytest.approx([160, 660, 240, 780])
    assert points[0, 0, :2].tolist() == pytest.approx([600, 100])


# ---------------------------------------------------------------- data: references and samples
def test_references_are_pose_compatible_ordered_from_closed_to_widest_and_never_near_the_target():
    rng = np.random.default_rng(0)
    shapes = np.stack([rng.uniform(0, 30, 100), rng.uniform(60, 70, 100), np.ones(100)], 1)
    poses = np.zeros((100, 2))
    poses[::2] = 1                                # every other frame looks elsewhere
    chosen = data.select_references(shapes, poses, 3, pose=np.zeros(2))
    opening = shapes[1::2, 0]
    assert (chosen % 2 == 1).all() and shapes[chosen[0], 0] == opening.min() and shapes[chosen[2], 0] == opening.max()
    assert np.array_equal(chosen, data.select_references(shapes, poses, 3, pose=np.zeros(2)))
    for seed in range(30):
        chosen = data.select_references(shapes, poses, 4, exclude=np.arange(44, 56), rng=np.random.default_rng(seed))
        assert ((chosen < 40) | (chosen >= 60)).all() and (np.diff(shapes[chosen, 0]) >= 0).all()


TINY = lipsync.PRESETS["tiny"]


def test_a_sample_depends_on_seed_and_number_only_and_has_the_documented_shapes(prepared):
    make = lambda seed=0: data.ClipDataset(data.list_clips(prepared), TINY, group=S, seed=seed, sync_audio="mel")
    first, again, other = make()[7], make()[7], make(1)[7]
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["target"], other["target"])
    assert first["refs"].shape == (3, 3, 128, 128) and first["target"].shape == (S, 3, 128, 128) and first["target"].dtype == torch.uint8
    assert first["mel"].shape == (80, 500) and first["window"].shape == (S, 11) and first["sync"].shape == (80, 4 * S)
    assert first["mouth"].shape == (S, 4) and first["amplitude"].shape == (S,)


def test_references_of_a_training_sample_are_at_least_five_frames_from_its_targets(prepared, monkeypatch):
    seen = []
    real = data.select_references
    monkeypatch.setattr(data, "select_references", lambda *a, **k: seen.append((k["exclude"], real(*a, **k))) or seen[-1][1])
    samples = data.ClipDataset(data.list_clips(prepared), TINY, group=S, amplitude_share=0)
    for i in range(10):
        start = int(samples[i]["start"])
        targets, refs = seen[-1]
        assert targets.tolist() == list(range(start, start + S)) and np.abs(refs[:, None] - targets).min() >= 5


def test_before_the_sync_loss_enters_the_frames_of_a_group_are_spread(prepared):
    samples = data.ClipDataset(data.list_clips(prepared), TINY, group=S, amplitude_share=0, spread=20)
    assert not any(samples[i]["in_sync"] for i in range(20)) and all(samples[i]["in_sync"] for i in range(20, 26))
    gaps = [int(samples[i]["window"][1, 5] - samples[i]["window"][0, 5]) for i in (*range(20), *range(20, 26))]       # F = 11: 5 is the frame itself
    assert max(gaps[:20]) > 10 and gaps[20:] == [1] * 6


def test_the_amplitude_coefficient_of_a_sample_is_how_much_wider_the_shown_mouth_is(prepared):
    clip = data.load_clip(data.list_clips(prepared)[0])
    wide = np.flatnonzero(clip.shapes[:, 0] > 5)
    for seed in range(10):
        heard = wide[seed:seed + 5]
        shown, a = data.pair_amplitude(clip, heard, np.random.default_rng(seed))
        assert a == pytest.approx((clip.shapes[shown, 0] / clip.shapes[heard, 0]).clip(0.3, 2), rel=1e-4)


def test_sync_negatives_never_share_a_frame_with_the_positive(prepared):
    clips = data.list_clips(prepared)
    samples = data.SyncDataset(clips, TINY, group=5, sync_audio="mel")
    clip_mels = {i: data.load_clip(p).mel.astype(np.float32) for i, p in enumerate(clips)}
    checked = 0
    for number in range(12):
        sample = samples[number]
        mel = clip_mels[int(sample["clip"])]
        find = lambda part: [t for t in range(0, 121) if np.array_equal(mel[:, 4 * t:4 * t + 20], part.numpy())]
        here = find(sample["sound"])
        if here:                                  # the clean half of the samples
            checked += 1
            assert all(min(abs(t - here[0]) for t in find(w)) >= 5 for w in sample["wrong"])
    assert checked
    batch = dict(sound=torch.arange(4.0)[:, None], wrong=-torch.ones(4, 2, 1), clip=torch.tensor([0, 0, 1, 2]))
    assert train.foreign_sounds(batch)[:, 2:, 0].tolist() == [[3, 2], [-1, 3], [1, 0], [2, 1]]


def test_a_sound_that_is_late_is_moved_to_its_pictures(prepared):
    series = np.arange(6.0)[:, None]
    assert data.heard_at(series, 2)[:, 0].tolist() == [2, 3, 4, 5, 5, 5] and data.heard_at(series, -1)[:, 0].tolist() == [0, 0, 1, 2, 3, 4]
    clips = data.list_clips(prepared)[:1]
    source, plain = data.clip_label(clips[0])[0], data.ClipDataset(clips, TINY, group=S)
    moved = data.ClipDataset(clips, TINY, group=S, offsets={source: 2})
    for i in range(4):
        start = int(plain[i]["start"])
        mel = data.load_clip(clips[0]).mel.astype(np.float32)
        late = np.minimum(np.arange(4 * start, 4 * (start + S)) + 8, mel.shape[1] - 1)
        assert torch.equal(moved[i]["target"], plain[i]["target"]) and np.array_equal(moved[i]["sync"].numpy(), mel[:, late])


def test_find_offsets_finds_a_late_sound_and_leaves_what_it_is_not_sure_of(prepared, tmp_path, monkeypatch):
    run = train.Run(settings(prepared, tmp_path))
    vectors = torch.eye(64)
    late = {source: (2, -3, 4)[i % 3] for i, source in enumerate(sorted({data.clip_label(p)[0] for p in run.clips}))}
    unsure = max(late)

    def embed(run, sync, paths):
        for path in paths:
            source = data.clip_label(path)[0]
            yield source, vectors[5:45], vectors[5 - late[source]:45 - late[source]] if source != unsure else torch.ones(40, 64)
    monkeypatch.setattr(train, "embed_clips", embed)
    assert train.find_offsets(run, None) == {**late, unsure: 0}


def test_a_broken_clip_file_is_named_once_and_skipped(prepared, tmp_path, capsys):
    paths = [pathlib.Path(shutil.copy(p, tmp_path)) for p in data.list_clips(prepared)[:2]]
    samples = data.ClipDataset(paths, TINY, group=S)
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    for i in range(8):
        assert samples[i]["clip"] == 1
    printed = capsys.readouterr().out
    assert printed.count("skipped from now on") == 1 and paths[0].name in printed
    sentences = data.SentenceDataset(paths)
    assert all(sentences[i][2] == 1 for i in range(8)) and data.load_or_skip(paths[0]) is None
    same = [shutil.copy(paths[1], tmp_path / f"{i}.npz") for i in range(2)]
    assert data.split_clips([*same, paths[0]], "" if not data.is_held_out(data.clip_label(paths[1])[0]) else "*") in ((same[:1], same[1:]), ([], same))


def test_clips_made_with_more_options_stay_and_a_single_video_still_holds_out_its_end(prepared):
    assert data.up_to_date([4, 9, "a", "yolo", None], [4, 9, "a", None, None]) and not data.up_to_date([4, 9, "a", None, None], [4, 9, "a", "yolo", None])
    assert not data.up_to_date([4, 8, "a", None, None], [4, 9, "a", None, None]) and not data.up_to_date(None, [4, 9, "a", None, None])
    one = [p for p in data.list_clips(prepared) if data.clip_label(p)[0].startswith("speaker000")]
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
    assert {data.clip_label(p)[0][:10] for p in held} >= {"speaker001"}


# ---------------------------------------------------------------- training
FLAGS = ("--preset", "tiny", "--batch", 2, "--group", 5, "--workers", 0, "--perceptual-weight", 0, "--device", "cpu",
         "--held-out", "speaker002*", "--sample-steps", 1000)


def training(prepared, out, *more, **options):
    return command("train.py", "--data", prepared, "--out", out, *FLAGS, *more, **options)


def settings(prepared, out, **more):
    base = dict(data=str(prepared), out=str(out), preset="tiny", batch=4, group=5, workers=0, perceptual_weight=0.0, gan_weight=0.0,
                sync_weight=0.0, lip_weight=0.0, device="cpu", held_out="speaker002*", steps=10)
    return train.TrainConfig(**{**base, **more})


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A run of all stages, a few steps each, through the command."""
    out = tmp_path_factory.mktemp("runs") / "all"
    result = training(prepared, out, "--sync-steps", 3, "--lip-steps", 3, "--steps", 4, "--sync-start", 0, "--gan-start", 0.5,
                      "--eval-clips", 1, "--min-sync-accuracy", 0)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_one_command_trains_all_stages_and_leaves_a_checkpoint_that_dubs(trained, demo, tmp_path):
    out, printed = trained
    assert {"config.json", "log.csv", "curves.png", "sync.pt", "lip.pt", "generator.pt", "weights.pt", "eval.json"} <= {p.name for p in out.iterdir()}
    assert re.search(r"network: 0\.1\d\d GMAC a frame, [1-9]\d* frames/s", printed), printed
    assert list((out / "samples").glob("*.png"))
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [r["stage"] for r in rows] == ["sync", "lip", "generator"]
    assert all(rows[-1][k] for k in ("total", "reconstruction", "sync", "lip", "gan", "discriminator", "lr", "grad_norm", "frames_per_s"))
    table = json.loads(printed.strip().splitlines()[-1])
    real = table["."]["real"]
    assert real["psnr"] > 60 and real["ssim"] == pytest.approx(1) and real["sharpness"] == pytest.approx(1) and real["r"] > 0.95 and real["lag"] == 0
    assert {"model", "copy", "silence", "amplitude 0.5", "amplitude 1.5"} <= set(table["."]) and (out / "strip_videos.png").is_file()
    assert set(table["."]["experts"]) == {"clips", "accuracy", "accuracy_10db", "accuracy_1s", "accuracy_1s_10db", "shift", "cer", "reads"} and "accuracy_10db" in printed
    videos = sorted(demo.glob("*.mp4"))
    result = command("infer.py", videos[0], videos[-1], "--weights", out / "weights.pt", "--out", tmp_path / "x.mp4")
    assert result.returncode == 0 and "offset" in result.stdout, result.stderr
    result = command("experts.py", tmp_path / "x.mp4", "--weights", out / "weights.pt", "--json")
    measured = json.loads(result.stdout)
    assert {"offset", "confidence", "distance", "text", "frames_with_face", "r_loudness"} <= set(measured) and measured["frames"] == 125


def test_a_stage_counts_as_done_with_all_its_steps_and_the_generator_with_its_weights(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    config = train.TrainConfig(out=str(tmp_path / "run"), sync_steps=3, lip_steps=4, steps=4)
    assert [train.is_done(config, stage) for stage in train.STAGES] == [True, False, True]
    (tmp_path / "run" / "weights.pt").unlink()
    assert not train.is_done(config, "generator")


def test_frozen_experts_do_not_change_by_a_single_bit(trained, prepared, tmp_path):
    for name in ("sync.pt", "lip.pt"):
        shutil.copy(trained[0] / name, tmp_path)
    run = train.Run(settings(prepared, tmp_path, batch=1, steps=20, sync_weight=0.03, lip_weight=0.001, sync_start=0.0, min_sync_accuracy=0.0))
    nets = []
    original = train.load_experts
    train.load_experts = lambda r: nets.append(original(r)) or nets[-1]
    try:
        task = train.generator_task(run)
    finally:
        train.load_experts = original
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets[0]]
    assert train.fit(run, task)
    for net, state in zip(nets[0], before):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())


def small_task(prepared, out, **more):
    torch.manual_seed(0)
    run = train.Run(settings(prepared, out, **more))
    return run, train.generator_task(run)


def test_accumulated_gradients_are_those_of_the_big_batch(prepared, tmp_path, monkeypatch):
    import contextlib
    monkeypatch.setattr(lipsync, "autocast", lambda device: contextlib.nullcontext())        # float32
    gradients = []
    monkeypatch.setattr(train, "update", lambda run, modules, *rest: gradients.append([p.grad.clone() for m in modules for p in m.parameters()]) or 0.0)
    for micro in (0, 3):                          # 4 groups in one, or 3 and 1
        run, task = small_task(prepared, tmp_path, micro=micro, group=2)
        batch = torch.utils.data.default_collate([task.dataset[i] for i in range(4)])
        task.step(batch, 0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_two_processes_get_the_gradients_of_one_with_the_joint_batch(prepared, tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(f"""
import contextlib, os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, lipsync, train
lipsync.autocast = lambda device: contextlib.nullcontext()           # float32
world = int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
config = train.TrainConfig(data={str(prepared)!r}, out={str(tmp_path)!r}, preset="tiny", batch=4 // world, group=2, workers=0,
                           perceptual_weight=0, gan_weight=0, sync_weight=0, lip_weight=0, device="cpu", held_out="speaker002*")
run = train.Run(config)
task = train.generator_task(run)
def catch(parameters, limit):
    torch.save([p.grad for p in parameters], f"{tmp_path}/{{world}}.{{run.rank}}.pt")
    return torch.zeros(())
train.nn.utils.clip_grad_norm_ = catch
task.step(next(iter(run.loader(task.dataset, 0, 1, 4 // world))), 0)
""")
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]):
        result = command(*launcher, script, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1.0", "2.0", "2.1"))
    assert len(one) > 50 and max(g.abs().max() for g in one) > 1e-4
    for a, b, c in zip(one, first, second):
        assert torch.equal(b, c) and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("stage, kind", (("sync", "sync"), ("generator", "lipsync")))
def test_a_killed_run_resumes_bit_for_bit(stage, kind, prepared, tmp_path):
    more = ("--stage", stage, "--steps", 6, "--sync-steps", 6, "--gan-start", 0.3, "--lip-weight", 0, "--sync-weight", 0)
    assert training(prepared, tmp_path / "whole", *more).returncode == 0
    words = [sys.executable, HERE / "train.py", "--data", prepared, "--out", tmp_path / "killed", *FLAGS, *more, "--save-minutes", 0]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / f"{stage}.pt"
    while process.poll() is None and not (file.is_file() and lipsync.load_checkpoint(file, kind)["step"] >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= lipsync.load_checkpoint(file, kind)["step"] < 6
    config = train.TrainConfig(out=str(tmp_path / "killed"), steps=6, sync_steps=6)
    with pytest.raises(lipsync.BadInput, match="--resume goes on"):  # what is there is not overwritten by mistake
        train.check_checkpoint(config, stage)
    with pytest.raises(lipsync.BadInput, match="planned for 6 steps"):
        train.check_checkpoint(dataclasses.replace(config, steps=9, sync_steps=9, resume=True), stage)
    assert training(prepared, tmp_path / "killed", *more, "--resume").returncode == 0
    whole, resumed = (lipsync.load_checkpoint(tmp_path / name / file.name, kind)["state"] for name in ("whole", "killed"))
    for part in ("net", "discriminator", "audio") if stage == "generator" else ("net",):
        assert all(torch.equal(v, resumed[part][k]) for k, v in whole[part].items()), part


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_and_its_loader_stops_it_between_two_steps_and_saves(sent, prepared, tmp_path):
    words = [sys.executable, HERE / "train.py", "--data", prepared, "--out", tmp_path, *FLAGS, "--workers", 1, "--stage", "sync", "--sync-steps", 5000]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = tmp_path / "log.csv"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; " in printed and "Traceback" not in errors, errors
    assert 20 <= lipsync.load_checkpoint(tmp_path / "sync.pt", "sync")["step"] < 5000


def test_a_preset_sets_defaults_and_a_flag_overrides_them():
    parse = lambda *words: train.parse_flags(train.TrainConfig, "", list(words))
    assert parse() == train.TrainConfig(**train.TRAINING["edge"]) and parse("--preset", "full") == train.TrainConfig(preset="full")
    tiny = parse("--preset", "tiny", "--steps", "7")
    assert tiny.steps == 7 and tiny.sync_steps == train.TRAINING["tiny"]["sync_steps"]


def test_bad_settings_are_one_line_and_exit_2(prepared, tmp_path, demo):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for words, part in (((tmp_path / "none", tmp_path / "o"), "no such folder"), ((tmp_path / "empty", tmp_path / "o"), "no video"),
                        ((prepared, tmp_path / "file"), "file"), ((prepared, tmp_path / "o", "--preset", "huge"), "--preset huge"),
                        ((prepared, tmp_path / "o", "--stage", "x"), "--stage x"),
                        ((prepared, tmp_path / "o", "--perceptual-weight", 0.01, "--vgg", tmp_path / "file"), "not VGG-19"), ((prepared, tmp_path / "o", "--batch", 0), "--batch"),
                        ((prepared, tmp_path / "o", "--stage", "generator", "--weights", tmp_path / "file"), "file"),
                        ((prepared, tmp_path / "o", "--audio-encoder", tmp_path / "file"), "--audio-encoder scratch")):
        result = training(*words)
        assert result.returncode == 2 and part in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("words, part", (((), "--data DIR is missing"), (("--gan", "wgan"), "--gan wgan: choose from"), (("--micro", "-1"), "--micro -1"),
                                         (("--refs", "9"), "refs must be 1..8"), (("--expert-size", "big"), "--expert-size big")))
def test_a_wrong_flag_is_told_before_the_work(words, part, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), *(("--data", str(prepared)) if words else ()), "--preset", "tiny", *words])
    with pytest.raises(lipsync.BadInput, match=part):
        train.main()


def test_weights_of_another_shape_name_the_field_that_differs(trained, prepared, tmp_path):
    result = training(prepared, tmp_path, "--stage", "generator", "--weights", trained[0] / "weights.pt", "--refs", 2, "--gan-weight", 0)
    assert result.returncode == 2 and "refs 3 there, 2 here" in result.stderr


def test_a_poor_sync_expert_is_not_used_and_the_run_says_so(trained, prepared, tmp_path):
    shutil.copy(trained[0] / "sync.pt", tmp_path)
    result = training(prepared, tmp_path, "--stage", "generator", "--steps", 1, "--gan-weight", 0, "--lip-weight", 0, "--sync-start", 0)
    assert "sync off (the expert's held-out accuracy" in result.stdout, result.stdout + result.stderr
    assert not next(csv.DictReader(open(tmp_path / "log.csv")))["sync"]


def test_nan_stops_the_run_names_the_clips_and_keeps_the_last_checkpoint(prepared, tmp_path):
    run, task = small_task(prepared, tmp_path)
    step = task.step
    task.step = lambda batch, number: {**step(batch, number), "total": math.nan if number == 2 else 1.0}
    with pytest.raises(lipsync.BadInput, match=r"total is not finite at step 2.*speaker.*npz"):
        train.fit(run, task)
    assert lipsync.load_checkpoint(tmp_path / "generator.pt")["step"] == 0


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    lipsync.save_checkpoint(path, {"kind": "lipsync", "step": 1})
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(lipsync.BadInput, match="old file is kept"):
        lipsync.save_checkpoint(path, {"kind": "lipsync", "step": 2})
    monkeypatch.undo()
    assert lipsync.load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_the_network_learns_one_clip_by_heart_and_listens(prepared, tmp_path):
    run, task = small_task(prepared, tmp_path, steps=160, lr=1e-3, batch=8, group=1, amplitude_share=0.0)
    task.dataset.paths, task.dataset.augment, samples = task.dataset.paths[:1], False, task.dataset
    task.dataset = [samples[i] for i in range(16)] * 80              # 16 frames of one clip, again and again
    seen, step = [], task.step
    task.step = lambda batch, number: (lambda figures: seen.append(figures["reconstruction"]) or figures)(step(batch, number))
    assert train.fit(run, task)
    assert np.mean(seen[-4:]) < 0.6 * np.mean(seen[:2])
    net, batch = task.parts["net"].eval(), torch.utils.data.default_collate(task.dataset[:16])
    error = lambda batch: (lambda refs, masked, audio, amplitude, target: losses.reconstruction_loss(
        net(refs, masked, audio, amplitude), target, 20.0, train.mouth_mask(batch["mouth"].flatten(0, 1), 128)).item())(
        *train.network_inputs(run, batch, run.audio_encoder))
    with torch.no_grad():
        assert error(batch) < 0.9 * error({**batch, "window": batch["window"].roll(1, 0)})   # another frame's sound draws another mouth


def test_teeth_that_change_their_look_vary_and_teeth_that_only_move_do_not():
    points = np.zeros((10, data.MESH_POINTS, 2), np.float32)
    pictures = np.zeros((10, 256, 256, 3), np.uint8)
    for t in range(10):
        points[t, data.LIPS_INNER[0]], points[t, data.LIPS_INNER[1:]] = (100 + t, 150), (140 + t, 170)
        pictures[t, 150:160, 100 + t:141 + t] = 200                   # the upper half of the mouth is white
    still = evaluate.teeth_variation(pictures, points)
    pictures[::2] //= 2
    assert still < 1 < 20 < evaluate.teeth_variation(pictures, points) and evaluate.teeth_variation(pictures[:4], points[:4]) is None


def test_metrics_of_a_picture_against_itself_and_of_a_shifted_series():
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert evaluate.ssim(picture, picture) == pytest.approx(1) and evaluate.ssim(picture, 255 - picture) < 0
    series = np.random.default_rng(1).normal(size=100)
    assert evaluate.correlation(series, 3 * series + 1) == pytest.approx(1) and evaluate.correlation(series, series * 0) == 0
    assert evaluate.lag_of(np.roll(series, 2), series) == 2 and evaluate.lag_of(np.roll(series, -3), series) == -3


# ---------------------------------------------------------------- dubbing
@pytest.fixture(scope="module")
def dubbing(tmp_path_factory):
    """A folder with clip.mp4 (2 s), long.wav (5 s), short.wav (0.6 s), face.png and random tiny weights."""
    folder = tmp_path_factory.mktemp("corpus")
    drawn.draw_clip(folder / "clip.mp4", drawn.Speaker.draw(1), seed=1, seconds=2)
    wave = data.read_audio(folder / "clip.mp4")
    soundfile.write(folder / "long.wav", np.tile(wave, 4)[:16000 * 5], 16000)
    soundfile.write(folder / "short.wav", wave[:9600], 16000)
    cv2.imwrite(str(folder / "face.png"), next(data.read_frames(folder / "clip.mp4"))[..., ::-1])
    torch.manual_seed(0)
    config = lipsync.PRESETS["tiny"]
    net, ear = lipsync.LipSync(config), lipsync.build_audio_encoder(config)
    lipsync.save_checkpoint(folder / "tiny.pt", {"kind": "lipsync", "config": dataclasses.asdict(config), "model": net.state_dict(),
                                                 "audio_encoder": {"dims": ear.dims, "state": ear.state_dict()}, "sync": None, "lip": None})
    return folder


@pytest.fixture(scope="module")
def networks(dubbing):
    return experts.load_networks(dubbing / "tiny.pt")


def frames_of(path):
    return list(data.read_frames(path))


def test_longer_sound_plays_the_frames_forward_backward_forward_bit_equal_to_the_first_reading(dubbing):
    frames = frames_of(dubbing / "clip.mp4")
    T = len(frames)
    prints = [infer.fingerprint(frame) for frame in frames]
    order = [*range(T), *range(T - 2, -1, -1), *range(1, T), *range(T - 2, T - 9, -1)]
    infer.CHUNK_BYTES, kept = 7 * frames[0].nbytes, infer.CHUNK_BYTES  # pieces that do not divide T
    try:
        for expected, (t, frame) in zip(order, infer.sweep(dubbing / "clip.mp4", prints)):
            assert t == expected and np.array_equal(frame, frames[t])
    finally:
        infer.CHUNK_BYTES = kept


def test_the_dubbed_video_is_as_long_as_the_sound(dubbing, networks, tmp_path):
    for sound, count in (("short.wav", 15), ("long.wav", 125)):
        report = infer.dub(dubbing / "clip.mp4", dubbing / sound, tmp_path / "out.mp4", networks, device="cpu")
        assert report["frames"] == count == len(frames_of(tmp_path / "out.mp4"))
        assert abs(len(data.read_audio(tmp_path / "out.mp4")) - count * 640) < 2048  # AAC pads


def test_a_still_picture_is_dubbed(dubbing, networks, tmp_path):
    report = infer.dub(dubbing / "face.png", dubbing / "short.wav", tmp_path / "out.mp4", networks, refs_sheet=tmp_path / "refs.png")
    assert report["frames"] == 15 and report["kept"] == 0
    assert cv2.imread(str(tmp_path / "refs.png")).shape == (256, 3 * 256, 3)


def test_pixels_outside_the_mask_are_bit_equal_and_the_lower_face_changes(dubbing):
    frame = frames_of(dubbing / "clip.mp4")[0]
    with data.FaceTracker() as tracker:
        points = np.stack(tracker.find(frame)[:1])
    affine = data.smooth_affines(points)[0]
    inside = data.warp(points, affine)
    mask = infer.face_mask(infer.outlines(inside)[0])
    assert not mask[:infer.MASK_TOP].any() and mask[int(inside[0, 14, 1]), int(inside[0, 14, 0])] == 255
    dubbed = infer.blend(frame, np.full((256, 256, 3), (255, 0, 255), np.uint8), affine, mask)
    height, width = frame.shape[:2]
    share = cv2.warpAffine(mask, cv2.invertAffineTransform(affine), (width, height))
    share = cv2.dilate(share, np.ones((3, 3)))
    assert np.array_equal(dubbed[share == 0], frame[share == 0])
    x, y = points[0, 14].round().astype(int)
    assert tuple(dubbed[y, x]) == (255, 0, 255)


def test_a_picture_in_other_colours_leaves_no_step_along_the_mask(dubbing):
    frame = frames_of(dubbing / "clip.mp4")[0]
    with data.FaceTracker() as tracker:
        points = np.stack(tracker.find(frame)[:1])
    affine = data.smooth_affines(points)[0]
    mask = infer.face_mask(infer.outlines(data.warp(points, affine))[0])
    crop = data.crop(frame, affine)
    other = np.clip(crop.astype(int) + (8, -5, 4), 0, 255).astype(np.uint8)
    rim = (mask > 60) & (mask < 200)
    step = lambda picture: np.abs(picture[rim].astype(float).mean(0) - crop[rim].mean(0)).max()
    assert step(other) > 4 and step(infer.match_colour(crop, other, mask)) < 1


def test_frames_without_a_face_stay_and_are_counted(dubbing, networks, tmp_path):
    frames = frames_of(dubbing / "clip.mp4")
    for frame in frames[20:30]:
        frame[:] = 40
    with data.VideoWriter(tmp_path / "gap.mp4", fps=25) as writer:
        for frame in frames:
            writer.write(frame)
    report = infer.dub(tmp_path / "gap.mp4", dubbing / "clip.mp4", tmp_path / "out.mp4", networks)
    assert report["frames"] == 50 and 10 <= report["kept"] <= 12
    dubbed = frames_of(tmp_path / "out.mp4")
    assert abs(dubbed[25].astype(int) - 40).max() <= 3 and abs(dubbed[10].astype(int) - 40).max() > 100


@pytest.mark.parametrize("case", "video_missing video_folder video_text video_empty video_truncated playlist no_face audio_missing audio_silentvideo "
                         "weights_missing weights_foreign weights_code amplitude out_folder out_suffix face compare_video compare_out".split())
def test_bad_input_names_the_fault_in_one_line_and_leaves_no_file(case, dubbing, networks, tmp_path):
    video, audio, weights, out = dubbing / "clip.mp4", dubbing / "short.wav", dubbing / "tiny.pt", tmp_path / "out.mp4"
    odd = tmp_path / "odd ' ü.mp4"
    text = {"video_text": b"hello", "video_empty": b"", "playlist": f"#EXTM3U\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n".encode(),
            "video_truncated": (dubbing / "clip.mp4").read_bytes()[:3000], "weights_foreign": b"PK nothing"}.get(case)
    if text is not None:
        odd.write_bytes(text)
    if case == "weights_code":
        odd.write_bytes(pickle.dumps(print, 2))
    if case in ("no_face", "audio_silentvideo"):
        with data.VideoWriter(odd) as writer:
            for _ in range(5):
                writer.write(np.full((120, 160, 3), 90, np.uint8))
    video = {"video_missing": tmp_path / "no.mp4", "video_folder": tmp_path}.get(case, odd if case in
             ("video_text", "video_empty", "video_truncated", "playlist", "no_face") else video)
    audio = {"audio_missing": tmp_path / "no.wav", "audio_silentvideo": odd}.get(case, audio)
    weights = {"weights_missing": tmp_path / "no.pt", "weights_foreign": odd, "weights_code": odd}.get(case, weights)
    out = {"out_folder": tmp_path / "no" / "out.mp4", "out_suffix": tmp_path / "out.txt"}.get(case, out)
    more = {"amplitude": {"amplitude": 3.0}, "face": {"face": 7}, "compare_video": {"compare": video}, "compare_out": {"compare": out}}.get(case, {})
    before, size = sorted(tmp_path.rglob("*")), (dubbing / "clip.mp4").stat().st_size
    with pytest.raises(lipsync.BadInput) as error:
        infer.dub(video, audio, out, weights if case.startswith("weights") else networks, **more)
    assert case.split("_")[0] in ("amplitude", "face") or any(str(path) in str(error.value) for path in (video, audio, weights, out))
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before and (dubbing / "clip.mp4").stat().st_size == size


def test_the_command_turns_bad_input_into_one_line_and_exit_2(dubbing, tmp_path):
    result = command("infer.py", tmp_path / "no ' ü.mp4", dubbing / "short.wav", "--weights", dubbing / "tiny.pt", "--out", tmp_path / "out.mp4")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and "no ' ü.mp4" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_dubs_and_prints_a_stage_table_and_the_path(dubbing, tmp_path):
    out = tmp_path / "a 'b' ü.mp4"
    result = command("infer.py", dubbing / "clip.mp4", dubbing / "short.wav", "--weights", dubbing / "tiny.pt", "--out", out, "--compare", tmp_path / "c.png")
    assert result.returncode == 0 and result.stdout.endswith(f"written: {out}\n"), result.stderr
    assert "landmarks" in result.stdout and "first frame after" in result.stdout and "0 of 15 frames kept" in result.stdout
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "c.png"] and cv2.imread(str(tmp_path / "c.png")).shape == (512, 8 * 256, 3)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_file_and_no_child_process(sent, dubbing, tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "infer.py"), dubbing / "clip.mp4", dubbing / "long.wav", "--weights", dubbing / "tiny.pt",
                                "--out", tmp_path / "out.mp4"], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores Ctrl-C
    for _ in range(4800):                                            # until the encoder has begun
        if list(tmp_path.glob(".*")):
            break
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert children and process.returncode == 130 and "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_memory_does_not_grow_with_the_length(dubbing, tmp_path):
    code = ("import sys, resource; sys.path.insert(0, sys.argv[1]); import infer, lipsync, torch; torch.set_num_threads(1)\n"
            "infer.dub(*sys.argv[2:5], experts.load_networks(sys.argv[5]))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    peaks = [int(subprocess.run([sys.executable, "-c", code, str(HERE), dubbing / "clip.mp4", dubbing / sound, tmp_path / "out.mp4", dubbing / "tiny.pt"],
                                capture_output=True, text=True, timeout=400).stdout) for sound in ("short.wav", "long.wav")]
    assert peaks[1] - peaks[0] < 150, peaks                           # MB

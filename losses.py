"""The five losses of S3 and the discriminator that the last of them needs.

total = rec_weight * reconstruction + coarse_weight * coarse + sync_weight * sync
        + lip_weight * lip reading + perceptual_weight * perceptual + gan_weight * adversarial

loss            code                  patent  formula, in plain text
sync            sync_loss             S3(1)   BCE(a . v / max(|a| |v|, 1e-6), label)
lip reading     lip_reading_loss      S3(2)   -mean log p(token | video, tokens before)
reconstruction  reconstruction_loss   S3(3)   mean |I_o - I_r|
coarse          the same              -       of means of 4 x 4 pixels (Choice)
perceptual      PerceptualLoss        S3(4)   sum_i |VGG_i(I_o) - VGG_i(I_r)| / (W_i H_i C_i)
adversarial     Discriminator,        S3(5)   patent's: to be lowered by the generator,
                  generator_loss                mean log(1 - disc_j(I_o)), and raised by
                  discriminator_loss            the discriminator, + mean log disc_j(I_r)
mouth           mouth_loss            -       mean |lips - true lips| / mouth width (stage mouth)

Letters as in common.py. I_o is the picture made, I_r the true one. Pictures are RGB, 0..1. Every
loss is a float32 scalar, also under autocast, averaged over the batch. The weights are flags
(options.TrainConfig); a and v are made by experts.SyncXNet, p by lipreader.LipReader.
"""
import torch
import torchvision
from torch import nn
from torch.nn import functional as fn
from torch.nn.utils.parametrizations import spectral_norm

from common import BadInput, check
from lips import LIP_POINTS

EPSILON = 1e-6  # least denominator, S3(1); how near to 0 and 1 a cosine may come in a log
STEEPEST = 100.0  # slope of the sync loss, per unit of cosine: that of log at 0.01
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB 0..1, as torchvision's VGG-19 was trained
IMAGENET_STD = (0.229, 0.224, 0.225)
LIPS_WEIGHT = 3.0  # of a lip point in mouth_loss, beside 1 of a jaw point
GAN_FORMS = ("non_saturating", "patent", "hinge")
VGG_LAYERS = (1, 6, 11, 20, 29)  # of vgg19().features: relu1_1, 2_1, 3_1, 4_1, 5_1


# ---------------------------------------------------------------- S3(1) lip synchronisation
def cosine(audio_embedding, video_embedding):
    """How alike the sound and the lips are: the fraction inside S3(1).

    Patent: a . v / max(|a| |v|, epsilon) with epsilon = 1e-6, S3(1).
    Shapes: audio_embedding [B, E], video_embedding [B, E] -> [B] float32, 0..1 if none is negative.
    Choice: computed in float32, since bfloat16 cannot tell 0.998 from 1.
    """
    B, E = audio_embedding.shape
    check(video_embedding, "B E", "video_embedding", B=B, E=E)
    audio, video = audio_embedding.float(), video_embedding.float()
    norms = audio.norm(dim=1) * video.norm(dim=1)  # [B]
    return (audio * video).sum(1) / norms.clamp(min=EPSILON)  # [B]


def sync_loss(audio_embedding, video_embedding, label=1.0):
    """Binary cross-entropy of the cosine between the sound of S frames and their lower halves.

    Patent: L_sync = BinaryCrossEntropy(a . v / max(|a| |v|, epsilon)), S3(1); S = 5 frames.
    Shapes: audio_embedding [B, E] >= 0, video_embedding [B, E] >= 0, label a float or [B] in 0..1
        -> scalar, 1e-6..13.8.
    Choice: label 1 for pictures that should fit their sound (all that the generator asks), 0 for
        the foreign sound that trains the expert. A probability needs a cosine in 0..1, so both
        embeddings end in ReLU (experts.SyncXNet); ValueError if not.
    """
    probability = cosine(audio_embedding, video_embedding)  # [B]
    if not torch.compiler.is_compiling():
        if min(audio_embedding.min(), video_embedding.min()) < 0:
            raise ValueError("sync_loss: an embedding has negative components; both must end in "
                             "ReLU, or the cosine is no probability")
    hit = label * safe_log(probability)  # [B]
    miss = (1 - label) * safe_log(1 - probability)  # [B]
    return -(hit + miss).mean()


def safe_log(probability):
    """log(probability) with a gradient everywhere.

    Shapes: probability [B] in 0..1 -> [B] in -13.8..-1e-6.
    Choice: kept 1e-6 away from 0 and 1. A clamp has no gradient there, 1 / probability one of 1e6,
        with which one pair outweighs its batch: so the slope is at most 100.
    """
    value = probability.detach().clamp(EPSILON, 1 - EPSILON)
    slope = (1 / value).clamp(max=STEEPEST)
    return value.log() + slope * (probability - probability.detach())


# ---------------------------------------------------------------- S3(2) lip reading
def lip_reading_loss(logits, tokens, pad):
    """How surprised the lip reader is by the true text, per token.

    Patent: L_lip = -text log p(text | video), p by the lip reader, S3(2).
    Shapes: logits [B, U, V], tokens [B, U] int64 (`pad` after each text's end) -> scalar >= 0, nats
        per token; 0 if there is none.
    Choice: averaged over real tokens, so that neither padding nor a long text weighs more.
    """
    B, U, V = logits.shape
    check(tokens, "B U", "tokens", B=B, U=U)
    logits = logits.flatten(0, 1).float()  # [B U, V]
    surprise = fn.cross_entropy(logits, tokens.flatten(), ignore_index=pad, reduction="sum")
    return surprise / (tokens != pad).sum().clamp(min=1)


# ---------------------------------------------------------------- S3(3) reconstruction
def reconstruction_loss(output, target, mouth_weight=0.0, mask=None):
    """Mean absolute difference of all values.

    Patent: mean of |output - target| over all values, S3(3). That is mouth_weight = 0.
    Shapes: output [B, C, H, W], target [B, C, H, W] in 0..1, mask None or [B, 1, H, W] in 0..1
        -> scalar in 0..1. ValueError for mouth_weight without a mask.
    Choice: a pixel counts 1 + mouth_weight times where mask is 1. It stays a weighted mean, so that
        the other weights keep their meaning; per picture, so that half batches give its gradient.
    """
    B, C, H, W = output.shape
    check(target, "B C H W", "target", B=B, C=C, H=H, W=W)
    difference = (output.float() - target.float()).abs()  # [B, C, H, W]
    if mouth_weight == 0:
        return difference.mean()
    if mask is None:
        raise ValueError("reconstruction_loss: mouth_weight needs a mask, [B, 1, H, W]")
    check(mask, "B C H W", "mask", B=B, C=1, H=H, W=W)
    weight = 1 + mouth_weight * mask.float()  # [B, 1, H, W]
    error = (difference * weight).sum((1, 2, 3))  # [B]
    return (error / (C * weight.sum((1, 2, 3)))).mean()


# ---------------------------------------------------------------- lips (not in the patent)
def mouth_loss(lips, target, width):
    """How far the predicted lips and jaw lie from the true ones.

    Shapes: lips [B, P, 2], target [B, P, 2], width [B] of the mouth, all in picture widths
        -> scalar, mouth widths.
    Choice: mean distance; a lip point weighs LIPS_WEIGHT times what a jaw point does.
    """
    B, P = check(lips, "B P 2", "lips").shape[:2]
    check(target, "B P 2", "target", B=B, P=P)
    distance = (lips.float() - target.float()).norm(dim=2) / width[:, None]  # [B, P]
    weight = torch.ones(P, device=lips.device)
    weight[:LIP_POINTS] = LIPS_WEIGHT
    return (distance * weight).sum(1).mean() / weight.sum()


# ---------------------------------------------------------------- S3(4) perceptual
def load_vgg(weights):
    """VGG-19's convolutions (up to the last one used).

    Patent: "a VGG model": VGG-19, S3(4).
    Shapes: weights "imagenet", "random" or the path of a file -> nn.Sequential:
        [B, 3, H, W] -> [B, 512, H/16, W/16].
    Choice: "imagenet" is torchvision's training, downloaded once; a path is that same file
        (vgg19-dcbb9e9d.pth); "random" is He initialisation from a fixed seed, which still compares
        texture (Ulyanov et al., 2018; He et al., 2016). What cannot be read is BadInput.
    """
    source = torchvision.models.VGG19_Weights.IMAGENET1K_V1
    vgg = torchvision.models.vgg
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        features = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)[: VGG_LAYERS[-1] + 1]
    if weights == "random":
        generator = torch.Generator().manual_seed(19)  # the same everywhere
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)
        return features
    try:
        if weights == "imagenet":
            state = source.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        features.load_state_dict({k: state[f"features.{k}"] for k in features.state_dict()})
    except Exception as error:  # no network, a broken download, no such file, one of another kind
        if weights == "imagenet":
            raise BadInput(f"VGG-19 weights cannot be downloaded ({error}): fetch {source.url} "
                           "elsewhere and pass --vgg FILE, or pass --vgg random") from None
        what = "not VGG-19 weights in torchvision's layout"
        if isinstance(error, OSError):
            what = f"cannot be read: {error.strerror or error}"
        raise BadInput(f"{weights}: {what} (expected the file {source.url})") from None
    return features


class PerceptualLoss(nn.Module):
    """Difference of two pictures as VGG-19 sees them, at full, half and quarter size.

    Patent: sum over layers i of |VGG_i(I_o) - VGG_i(I_r)| / (W_i H_i C_i), at 3xHxW, 3xH/2xW/2,
        3xH/4xW/4, S3(4).
    Shapes: output [B, 3, H, W], target [B, 3, H, W] in 0..1, H and W >= 64 -> scalar >= 0.
    Choice: I_r is the true frame. Layers: the first ReLU of each block (Wang et al., pix2pixHD,
        2018). Halved by averaging 2x2 pixels. The gradient reaches the output only.
    """

    def __init__(self, weights="imagenet", layers=VGG_LAYERS, scales=(1, 1 / 2, 1 / 4)):
        super().__init__()
        self.vgg = load_vgg(weights)[: max(layers) + 1].eval().requires_grad_(False)
        for layer in self.vgg:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the layers kept must not be overwritten by the next
        self.layers, self.scales = set(layers), scales
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            plane = torch.tensor(values)[:, None, None]  # [3, 1, 1]
            self.register_buffer(name, plane, persistent=False)

    def train(self, mode=True):
        return super().train(False)  # frozen

    def features(self, pictures):
        features = []
        maps = (pictures - self.mean) / self.std  # [B, 3, H, W]
        for index, layer in enumerate(self.vgg):
            maps = layer(maps)  # [B, C_i, H_i, W_i]
            if index in self.layers:
                features.append(maps)
        return features

    def forward(self, output, target):
        B, C, H, W = output.shape
        check(output, "B C H W", "output", C=3)
        check(target, "B C H W", "target", B=B, C=3, H=H, W=W)
        total = output.new_zeros((), dtype=torch.float32)
        for scale in self.scales:
            step = round(1 / scale)
            with torch.no_grad():
                wanted = self.features(fn.avg_pool2d(target, step))
            found = self.features(fn.avg_pool2d(output, step))
            for made, true in zip(found, wanted):  # [B, C_i, H_i, W_i]
                total = total + (made.float() - true.float()).abs().mean()
        return total


# ---------------------------------------------------------------- S3(5) adversarial
class Discriminator(nn.Module):
    """Judges patches of a picture as real or made, at several sizes of the picture.

    Patent: disc_j, the GAN discriminator, S3(5); j is not explained.
    Shapes: pictures [B, 3, H, W] in 0..1 (whole faces or lower halves) -> list over scales of
        logits [B, 1, h, w], h = H / 2^(j+3), w = W / 2^(j+3), j = 0, 1, ...; disc_j = sigmoid.
    Choice: j is the scale (Wang et al., pix2pixHD, 2018); patches (Isola et al., 2017), since the
        whole face is right anyway; spectral normalisation (Miyato et al., 2018) instead of
        BatchNorm, so that pictures do not see each other.
    """

    def __init__(self, scales=2, channels=32):
        super().__init__()
        widths = (3, channels, channels * 2, channels * 4)
        self.nets = nn.ModuleList()
        for _ in range(scales):
            layers = []
            for before, after in zip(widths, widths[1:]):
                layers.append(spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)))
                layers.append(nn.LeakyReLU(0.2))
            layers.append(spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))
            self.nets.append(nn.Sequential(*layers))

    def forward(self, pictures):
        check(pictures, "B C H W", "pictures", C=3)
        pictures = pictures * 2 - 1  # -1..1
        pictures = pictures.contiguous(memory_format=torch.channels_last)  # on CPUs 8 times faster
        return [net(fn.avg_pool2d(pictures, 2**j)) for j, net in enumerate(self.nets)]


def discriminator_loss(real_logits, fake_logits, form="non_saturating"):
    """What the discriminator minimises.

    Patent: L_disc = mean log(1 - disc_j(I_o)) + mean log disc_j(I_r), S3(5), to be raised; so this
        is minus that.
    Shapes: two lists over scales of [B, 1, h, w] -> scalar >= 0; 2 ln 2 = 1.39 (hinge: 2) where it
        cannot tell.
    Choice: for a logit x log disc = -softplus(-x), log(1 - disc) = -softplus(x), always finite. The
        mean over scales j. "hinge" is max(0, 1 - x_r) + max(0, 1 + x_o) (Lim and Ye, 2017).
    """
    check_form(form)
    terms = []
    for real, fake in zip(real_logits, fake_logits, strict=True):
        real, fake = real.float(), fake.float()
        if form == "hinge":
            terms.append(fn.relu(1 - real).mean() + fn.relu(1 + fake).mean())
        else:
            terms.append(fn.softplus(-real).mean() + fn.softplus(fake).mean())
    return torch.stack(terms).mean()


def generator_loss(fake_logits, form="non_saturating"):
    """What the generator minimises.

    Patent: L_gen = mean log(1 - disc_j(I_o)), S3(5): form="patent", <= 0.
    Shapes: list over scales of [B, 1, h, w] -> scalar.
    Choice: "non_saturating" is -mean log disc_j(I_o) (Goodfellow et al., 2014, section 3): the same
        goal, but the gradient does not vanish while the discriminator wins, as at the start.
        "hinge" is -mean x_o (Lim and Ye, 2017). The mean over scales j.
    """
    check_form(form)
    terms = []
    for fake in fake_logits:
        fake = fake.float()
        if form == "hinge":
            terms.append(-fake.mean())
        elif form == "patent":
            terms.append(-fn.softplus(fake).mean())  # log(1 - disc)
        else:
            terms.append(fn.softplus(-fake).mean())  # -log disc
    return torch.stack(terms).mean()


def check_form(form):
    """ValueError if there is no such form of the adversarial loss"""
    if form not in GAN_FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(GAN_FORMS)}")

"""The five losses of S3 and the discriminator that the last of them needs.

total = rec_weight * reconstruction + coarse_weight * coarse + sync_weight * sync
        + lip_weight * lip reading + perceptual_weight * perceptual + gan_weight * adversarial

loss            code                  patent  formula, in plain text
sync            sync_loss             S3(1)   BCE(a . v / max(|a| |v|, 1e-6), label)
lip reading     lip_reading_loss      S3(2)   -mean log p(token | video, tokens before)
reconstruction  reconstruction_loss   S3(3)   mean |I_o - I_r|
coarse          the same              -       of means of 4 x 4 pixels (Choice)
perceptual      PerceptualLoss        S3(4)   sum_i |VGG_i(I_o) - VGG_i(I_r)| / (W_i H_i C_i)
adversarial     generator_loss,       S3(5)   mean log(1 - disc_j(I_o)), by the discriminator
                discriminator_loss            to be raised with + mean log disc_j(I_r); --gan: hinge
mouth           mouth_loss            -       mean |lips - true lips| / mouth width (stage mouth)

Letters as in common.py. I_o is the picture made, I_r the true one: RGB, 0..1. Every loss is a
float32 scalar, averaged over the batch. experts.SyncXNet makes a and v, lipreader.LipReader p.
"""
import torch
from torch import nn
from torch.nn import functional as fn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import VGG19_Weights, vgg
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize

from common import check, load_pretrained
from lips import LIP_POINTS

EPSILON = 1e-6  # least denominator, S3(1); how near to 0 and 1 a cosine may come in a log
STEEPEST = 100.0  # slope of the sync loss, per unit of cosine: that of log at 0.01
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its RGB 0..1
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
    Shapes: both embeddings [B, E] >= 0, label a float or [B] in 0..1 -> scalar, 1e-6..13.8.
    Choice: label 1 for pictures that should fit their sound, 0 for the foreign sound that trains
        the expert. A probability needs a cosine in 0..1: both embeddings end in ReLU (ValueError).
    """
    probability = cosine(audio_embedding, video_embedding)  # [B]
    least = torch.minimum(audio_embedding.min(), video_embedding.min())
    if not torch.compiler.is_compiling() and least < 0:
        raise ValueError("sync_loss: an embedding has negative components: end it in ReLU")
    hit, miss = safe_log(probability), safe_log(1 - probability)  # [B] each
    return -(label * hit + (1 - label) * miss).mean()


def safe_log(probability):
    """log(probability) with a gradient everywhere.

    Shapes: probability [B] in 0..1 -> [B] in -13.8..-1e-6.
    Choice: 1e-6 away from 0 and 1. A clamp has no gradient there, 1 / probability one of 1e6, with
        which one pair outweighs its batch: so the slope is at most STEEPEST.
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
    surprise = fn.cross_entropy(logits.mT.float(), tokens, ignore_index=pad, reduction="sum")
    return surprise / (tokens != pad).sum().clamp(min=1)


# ---------------------------------------------------------------- S3(3) reconstruction
def reconstruction_loss(output, target, mouth_weight=0.0, mask=None):
    """Mean absolute difference of all values.

    Patent: mean of |output - target| over all values, S3(3). That is mouth_weight = 0.
    Shapes: output [B, C, H, W], target [B, C, H, W] in 0..1, mask None or [B, 1, H, W] in 0..1
        -> scalar in 0..1. ValueError for mouth_weight without a mask.
    Choice: a pixel counts 1 + mouth_weight times where mask is 1: a weighted mean, so that the
        other weights keep their meaning; per picture, so that half batches give its gradient.
    """
    B, C, H, W = output.shape
    check(target, "B C H W", "target", B=B, C=C, H=H, W=W)
    difference = (output.float() - target.float()).abs()  # [B, C, H, W]
    if mouth_weight == 0:
        return difference.mean()
    check(mask, "B 1 H W", "mask", B=B, H=H, W=W)
    weight = 1 + mouth_weight * mask.float()  # [B, 1, H, W]
    error = (difference * weight).sum((1, 2, 3))  # [B]
    return (error / (C * weight.sum((1, 2, 3)))).mean()


# ---------------------------------------------------------------- lips (not in the patent)
def mouth_loss(lips, target, width):
    """How far the predicted lips and jaw lie from the true ones.

    Shapes: lips, target [B, P, 2], the mouth's width [B], picture widths -> scalar, mouth widths.
    Choice: mean distance; a lip point weighs LIPS_WEIGHT times what a jaw point does.
    """
    B, P, _ = check(lips, "B P 2", "lips").shape
    check(target, "B P 2", "target", B=B, P=P)
    distance = (lips.float() - target.float()).norm(dim=2) / width[:, None]  # [B, P]
    weight = torch.ones(P, device=lips.device)
    weight[:LIP_POINTS] = LIPS_WEIGHT
    return (distance * weight).sum(1).mean() / weight.sum()


# ---------------------------------------------------------------- S3(4) perceptual
def load_vgg(weights):
    """VGG-19's convolutions, up to the last one used.

    Patent: "a VGG model": VGG-19, S3(4).
    Shapes: weights "imagenet", "random" or the path of a file -> nn.Sequential:
        [B, 3, H, W] -> [B, 512, H/16, W/16].
    Choice: "imagenet" is torchvision's training, a path that same file; "random" is He's start from
        a fixed seed, which still compares texture (Ulyanov et al., 2018). Else BadInput.
    """
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        torch.manual_seed(19)
        features = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)[:VGG_LAYERS[-1] + 1]
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    if weights != "random":
        net, source = nn.ModuleDict({"features": features}), VGG19_Weights.IMAGENET1K_V1
        load_pretrained(net, weights, source, "VGG-19", "--vgg FILE or --vgg random", strict=False)
    return features


class PerceptualLoss(nn.Module):
    """Difference of two pictures as VGG-19 sees them, at full, half and quarter size.

    Patent: sum over layers i of |VGG_i(I_o) - VGG_i(I_r)| / (W_i H_i C_i), at 3xHxW, 3xH/2xW/2,
        3xH/4xW/4, S3(4).
    Shapes: output [B, 3, H, W], target [B, 3, H, W] in 0..1, H and W >= 64 -> scalar >= 0.
    Choice: I_r is the true frame, which gets no gradient. Layers: the first ReLU of each block
        (Wang et al., pix2pixHD, 2018). Halved by averaging 2x2 pixels.
    """

    def __init__(self, weights="imagenet", layers=VGG_LAYERS):
        super().__init__()
        self.features = create_feature_extractor(load_vgg(weights).eval(), [*map(str, layers)])
        self.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # frozen

    def forward(self, output, target):
        B, _, H, W = check(output, "B 3 H W", "output").shape
        check(target, "B 3 H W", "target", B=B, H=H, W=W)
        output, target = (normalize(x, *IMAGENET) for x in (output, target))
        total = output.new_zeros((), dtype=torch.float32)
        for step in (1, 2, 4):
            wanted = self.features(fn.avg_pool2d(target.detach(), step))
            found = self.features(fn.avg_pool2d(output, step))
            for name, made in found.items():  # [B, C_i, H_i, W_i]
                total = total + fn.l1_loss(made.float(), wanted[name].float())
        return total


# ---------------------------------------------------------------- S3(5) adversarial
class Discriminator(nn.Module):
    """Judges patches of a picture as real or made, at several sizes of the picture.

    Patent: disc_j, the GAN discriminator, S3(5); j is not explained.
    Shapes: pictures [B, 3, H, W] in 0..1 (whole faces or lower halves) -> list over scales of
        logits [B, 1, h, w], h = H / 2^(j+3), w = W / 2^(j+3), j = 0, 1, ...; disc_j = sigmoid.
    Choice: j is the scale (Wang et al., pix2pixHD, 2018); patches (Isola et al., 2017), since the
        whole face is right anyway; spectral normalisation (Miyato et al., 2018).
    """

    def __init__(self, scales=2, channels=32):
        super().__init__()
        widths = (3, channels, channels * 2, channels * 4)
        self.nets = nn.ModuleList()
        for _ in range(scales):
            net = nn.Sequential()
            for before, after in zip(widths, widths[1:]):
                conv = nn.Conv2d(before, after, 4, stride=2, padding=1)
                net.extend((spectral_norm(conv), nn.LeakyReLU(0.2)))
            self.nets.append(net.append(spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))))

    def forward(self, pictures):
        check(pictures, "B C H W", "pictures", C=3)
        x = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)  # 8 times faster
        return [net(fn.avg_pool2d(x, 2**j)) for j, net in enumerate(self.nets)]  # -1..1 goes in


def discriminator_loss(real_logits, fake_logits, form="non_saturating"):
    """What the discriminator minimises.

    Patent: minus L_disc = mean log(1 - disc_j(I_o)) + mean log disc_j(I_r), S3(5), to be raised.
    Shapes: two lists over scales of [B, 1, h, w] -> scalar; 1.39 (hinge: 2) where it cannot tell.
    Choice: of a logit x, log disc = -softplus(-x) and log(1 - disc) = -softplus(x): always finite.
        The mean over scales j. "hinge" is max(0, 1 - x_r) + max(0, 1 + x_o) (Lim and Ye, 2017).
    """
    check_form(form)
    terms = []
    for real, fake in zip(real_logits, fake_logits, strict=True):
        for x in (-real.float(), fake.float()):  # high where it is wrong
            cost = fn.relu(1 + x) if form == "hinge" else fn.softplus(x)
            terms.append(cost.mean())
    return 2 * torch.stack(terms).mean()


def generator_loss(fake_logits, form="non_saturating"):
    """What the generator minimises.

    Patent: L_gen = mean log(1 - disc_j(I_o)), S3(5): form="patent", <= 0.
    Shapes: list over scales of [B, 1, h, w] -> scalar. ValueError if `form` is not in GAN_FORMS.
    Choice: "non_saturating" is -mean log disc_j(I_o) (Goodfellow et al., 2014, section 3): the same
        goal, but its gradient does not vanish while the discriminator wins, as at the start.
    """
    check_form(form)
    terms = []
    for x in map(torch.Tensor.float, fake_logits):
        cost = {"non_saturating": fn.softplus(-x), "patent": -fn.softplus(x), "hinge": -x}
        terms.append(cost[form].mean())
    return torch.stack(terms).mean()


def check_form(form):
    """ValueError if there is no such form of the adversarial loss"""
    if form not in GAN_FORMS:
        raise ValueError(f"form is {form!r}, expected one of {GAN_FORMS}")

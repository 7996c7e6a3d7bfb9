"""Where the lips lie, and references that follow them and the head: our choice, not in the patent.

    stage | code          | learned from
    lips  | LipHead       | landmarks and sound alone (train.py, stage mouth)
    warp  | ReferenceWarp | nothing: geometry

LipSync (lipsync.py) has S2(4)a-f make tokens of the sound, LipHead read the lips off them, and
ReferenceWarp bring each reference to the frame's head pose and to those lips. Letters as in
common.py; points are (x, y) in picture widths, 0..1 inside the picture.
"""
import torch
from torch import nn
from torch.nn import functional as fn

from common import check

LIP_POINTS = 40                                   # of a face's K points: the first are the lips
MOUTH_POINTS = 61                                 # P: the first are lips and jaw
MOUTH_CORNERS = (0, 10)                           # their places among the K points


def mouth_width(points):
    """Distance of the mouth's corners of the most closed reference, with the frame's head pose.

    Shapes: points [B, R, 2, K, 2] as LipSync takes them -> [B] picture widths.
    Choice: the unit of LipHead and losses.mouth_loss: a near face moves no more than a far one.
    """
    right, left = (points[:, 0, 1, corner] for corner in MOUTH_CORNERS)          # [B, 2]
    return torch.linalg.vector_norm(left - right, dim=-1).clamp(min=0.02)


class LipHead(nn.Module):
    """Where the lips and the jaw lie, as the sound asks for them.

    Patent: silent; but its S2(4)a-f work on the sound alone.
    Shapes: tokens [B, F, C] of ModalityFusion.encode_audio, points [B, R, 2, K, 2] picture widths
        -> lips [B, P, 2] picture widths.
    Choice: from the frame's own token and the references' lips, with the frame's head pose and in
        mouth widths; relative to the most closed reference. It learns without pictures (train.py,
        stage mouth). Source: landmarks between sound and picture are IP-LAP's (Zhong et al. 2023).
    """

    def __init__(self, config):
        super().__init__()
        width, values = config.lip_width, 2 * MOUTH_POINTS
        self.sound = nn.Linear(config.channels[-1], width)
        self.shapes = nn.Linear(config.refs * values, width)
        self.layers = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Dropout(config.dropout), nn.Linear(width, width),
            nn.LeakyReLU(0.2), nn.Dropout(config.dropout), nn.Linear(width, values))
        self.layers[-1].weight.data.mul_(0.1)

    def forward(self, tokens, points):
        B, F, C = check(tokens, "B F C", "lips.tokens").shape
        check(points, "B R 2 K 2", "lips.points", B=B)
        mouths = points[:, :, 1, :MOUTH_POINTS].float()              # [B, R, P, 2]
        closed = mouths[:, 0]                                        # [B, P, 2]
        width = mouth_width(points.float())[:, None, None]           # [B, 1, 1]
        centre = closed.mean(1, keepdim=True)                        # [B, 1, 2]
        shapes = (mouths - centre[:, None]) / width[:, None]         # [B, R, P, 2] mouth widths
        shapes = shapes.flatten(1).to(tokens.dtype)                  # [B, R P 2]
        now = tokens[:, F // 2]                                      # [B, C]
        x = self.sound(now) + self.shapes(shapes)                    # [B, lip_width]
        moved = self.layers(x).float()                               # [B, P 2] mouth widths
        moved = moved.unflatten(1, (-1, 2))                          # [B, P, 2]
        return check(closed + moved * width, "B P 2", "lips.lips", B=B)


class ReferenceWarp(nn.Module):
    """Each reference's lower half with the frame's head pose and the lips that are wanted.

    Patent: silent; Fig. 7 wants references "without a large gap" to the frame.
    Shapes: refs [B, R, 3, H, W] 0..1, source [B, R, K, 2] where the points lie, target
        [B, R, K, 2] where they shall lie, picture widths -> [B, R, 3, H, W] 0..1.
    Choice: at the nodes of a coarse grid the flow is the mean of source - target, weighted by a
        narrow Gaussian of the distance to the target plus a little of a wide one, for where no
        point is near. Bilinear to full size; one bicubic sampling, since a bilinear one blurs.
        Towards the upper half it fades out.
    """
    NODES = 64                                    # in a picture's width: one each 4 px of 256
    NARROW, WIDE, SHARE = 6 / 256, 40 / 256, 1e-3  # sigmas, picture widths; weight of the wide one

    def forward(self, refs, source, target):
        B, R, _, H, W = check(refs, "B R 3 H W", "warp.refs").shape
        check(source, "B R K 2", "warp.source", B=B, R=R)
        check(target, "B R K 2", "warp.target", B=B, R=R, K=source.shape[2])
        source = source.flatten(0, 1).float()                        # [BR, K, 2]
        target = target.flatten(0, 1).float()                        # [BR, K, 2]
        rows = lower_rows(refs).shape[3]                             # 5/8 H
        with torch.autocast(refs.device.type, enabled=False):
            flow = self.flow(source, target)                         # [BR, 2, 40, 64]
            flow = fn.interpolate(flow, size=(rows, W), mode="bilinear")         # [BR, 2, 5/8 H, W]
            x, y = middles(W, refs), middles(H, refs)                # [W], [H]
            place = torch.meshgrid(x, y[H - rows:], indexing="xy")
            place = torch.stack(place)                               # [2, 5/8 H, W]
            grid = (place + flow).permute(0, 2, 3, 1)                # [BR, 5/8 H, W, 2]
            grid = 2 * grid - 1                                      # grid_sample's -1..1
            pictures = refs.flatten(0, 1).float()                    # [BR, 3, H, W]
            lower = fn.grid_sample(pictures, grid, mode="bicubic", padding_mode="border",
                                   align_corners=False)
        lower = lower.clamp(0, 1).to(refs.dtype)                     # [BR, 3, 5/8 H, W]
        lower = lower.unflatten(0, (B, R))                           # [B, R, 3, 5/8 H, W]
        moved = torch.cat([refs[:, :, :, :H - rows], lower], 3)      # [B, R, 3, H, W]
        return check(moved, "B R 3 H W", "warp.moved", B=B, R=R)

    def flow(self, source, target):
        """source, target [BR, K, 2] -> [BR, 2, 40, 64] (x, y) towards the source, picture widths"""
        columns = middles(self.NODES, target)                        # [64]
        rows = lower_rows(columns[:, None])[:, 0]                    # [40]
        x, y = target.unbind(2)                                      # [BR, K]
        narrow, wide = self.NARROW, self.WIDE
        down = [gaussian(rows, y, narrow), self.SHARE * gaussian(rows, y, wide)]
        across = [gaussian(columns, x, narrow), gaussian(columns, x, wide)]
        down, across = torch.cat(down, 2), torch.cat(across, 2)      # [BR, 40, 2K], [BR, 64, 2K]
        step = (source - target).mT                                  # [BR, 2, K]
        step = torch.cat([step, torch.ones_like(step[:, :1])], 1)    # the 1 sums the weights
        step = step.repeat(1, 1, 2)[:, :, None]                      # [BR, 3, 1, 2K]
        weighted = step * down[:, None]                              # [BR, 3, 40, 2K]
        total = weighted.flatten(1, 2) @ across.mT                   # [BR, 3*40, 64]
        total = total.unflatten(1, (3, -1))                          # [BR, 3, 40, 64]
        moved, weight = total[:, :2], total[:, 2:]
        node = torch.arange(len(rows), device=target.device)
        fade = ((node - 1) / 4).clamp(0, 1)                          # [40]
        return moved / (weight + 1e-12) * fade[:, None]


def middles(count, like):
    """Where the middles of `count` cells lie, 0..1 -> [count], on the device of `like`"""
    cell = torch.arange(count, device=like.device)
    return (cell + 0.5) / count


def gaussian(nodes, places, sigma):
    """How near each place [BR, K] lies to each node [nodes] -> [BR, nodes, K], 1e-13..1

    Choice: a floor, since a CPU multiplies denormal numbers a hundred times slower."""
    distance = nodes[:, None] - places[:, None]
    exponent = -0.5 * (distance / sigma) ** 2
    return torch.exp(exponent.clamp(min=-30))


def lower_rows(x):
    """The lower 5/8 of the rows: the half that is drawn, and an eighth above for the convolutions.

    Shapes: x [..., h, w] -> [..., 5/8 h, w]: rows 3/8 h to h; 0 to h/2 are given, h/2 to h drawn.
    Choice: a third less work.
    """
    h = x.shape[-2]
    return x[..., 3 * h // 8:, :]

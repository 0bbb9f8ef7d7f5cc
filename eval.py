"""Measure networks and robustify.py's plug-ins under distribution shift (Secs. 3 and 5).

    python eval.py                                                # what the demo left in demo/
    python eval.py --data imagenet-c/                             # --model robust.pt
    python eval.py --data cifar10/test --corrupt --model student.pt teacher.pt robust.pt

Folders are recognised by their layout: ImageNet-C (CORRUPTION/SEVERITY/CLASS/), numeric class
folders (ImageNetV2: the folder is the label), a subset of the model's classes by folder name
(ImageNet-R, -A: logits are sliced to the subset; the row "of all" decides among all classes), any
class folders. A model is a plug-in (robust.pt), a network of --make-teacher, or a name that
robustify.py knows. Of a plug-in every predictor is measured in one pass: the original, each head,
the selected one, and the oracle, which is right where the clean or the unclean head is.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from robustify import (HEADS, Config, Refusal, Views, command, image_folder, load, load_network,
                       measured, read_tensors, refuse)

ALEXNET = dict(  # top-1 error of AlexNet [11], for mCE
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572,
    fog=.819324, brightness=.564592, contrast=.853204, elastic_transform=.646056,
    pixelate=.717840, jpeg_compression=.606500)
ALEXNET_CLEAN = 0.43478


# --- Corruptions [11], batched; parameters for severity 1-5 at 224, 64 and 32 px ------------------


PARAMETERS = {
    "gaussian_noise": {224: (.08, .12, .18, .26, .38), 64: (.04, .08, .12, .15, .18),
                       32: (.04, .06, .08, .09, .1)},
    "shot_noise": {224: (60, 25, 12, 5, 3), 64: (250, 100, 50, 30, 15),
                   32: (500, 250, 100, 75, 50)},
    "impulse_noise": {224: (.03, .06, .09, .17, .27), 64: (.01, .02, .05, .08, .14),
                      32: (.01, .02, .03, .05, .07)},
    "defocus_blur": {224: ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     64: ((.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)),
                     32: ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))},
    "brightness": {224: (.1, .2, .3, .4, .5), 64: (.1, .2, .3, .4, .5),
                   32: (.05, .1, .15, .2, .3)},
    "contrast": {224: (.4, .3, .2, .1, .05), 64: (.4, .3, .2, .1, .05), 32: (.75, .5, .4, .3, .15)},
    "pixelate": {224: (.6, .5, .4, .3, .25), 64: (.9, .8, .7, .6, .5),
                 32: (.95, .9, .85, .75, .65)},
    "jpeg_compression": {224: (25, 18, 15, 10, 7), 64: (65, 58, 50, 40, 25),
                         32: (80, 65, 58, 50, 40)},
    "speckle_noise": {224: (.15, .2, .35, .45, .6), 64: (.15, .2, .25, .3, .35),
                      32: (.06, .1, .12, .16, .2)},
    "gaussian_blur": {224: (1, 2, 3, 4, 6), 64: (.5, .75, 1, 1.25, 1.5), 32: (.4, .6, .7, .8, 1)},
    "saturate": {224: ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
                 64: ((.3, 0), (.1, 0), (2, 0), (5, .1), (30, .2)),
                 32: ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))},
}
DEMO = "speckle_noise gaussian_blur saturate impulse_noise defocus_blur jpeg_compression".split()


def filtered(x, kernel, mode):
    """x (B, 3, H, W) under a kernel (h, w), each channel alone; `mode` names the border."""
    h, w = kernel.shape
    x = F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode=mode)
    return F.conv2d(x, kernel.to(x).expand(3, 1, h, w), groups=3)


def gaussian_kernel(sigma, radius):
    """Normalised Gaussian of 2 * radius + 1 taps, (1, taps)."""
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0)**2 / (2 * sigma**2))[None]
    return kernel / kernel.sum()


def disk_kernel(radius, alias):
    """A disk smoothed by a Gaussian of sigma `alias`."""
    grid = torch.arange(-max(8, radius), max(8, radius) + 1.0)
    disk = (grid[:, None]**2 + grid**2 <= radius**2).float()
    blur = gaussian_kernel(alias, 1 if radius <= 8 else 2)
    pad = blur.shape[1] // 2
    disk = F.pad((disk / disk.sum())[None, None], (pad,) * 4, mode="reflect")
    return F.conv2d(disk, (blur.T @ blur)[None, None])[0, 0]


def saturation(x, factor, shift):
    """HSV saturation s -> clip(s * factor + shift, 0, 1): channels move away from the value v."""
    v = x.amax(1, keepdim=True)
    s = (v - x.amin(1, keepdim=True)) / v.clamp_min(1e-8)
    target = (s * factor + shift).clamp(0, 1)
    grey = s < 1e-8  # hue 0: an added saturation turns grey to red
    away = torch.where(grey, torch.tensor([0., 1, 1]).to(x)[:, None, None] * v * target,
                       (v - x) * target / s.clamp_min(1e-8))
    return v - away


def box(x, scale):
    """Down to int(n * scale) and up again with Pillow's BOX filter, through 8 bits."""
    done = []
    for image in (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        h, w = image.shape[:2]
        small = Image.fromarray(image).resize((int(w * scale), int(h * scale)), Image.BOX)
        done.append(np.asarray(small.resize((w, h), Image.BOX)))
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).to(x.device) / 255


def jpeg(x, quality):
    """Encode and decode, with torchvision's CPU codec."""
    images = encode_jpeg(list((x * 255).round().byte().cpu()), quality)
    return torch.stack(decode_jpeg(images, ImageReadMode.RGB)).to(x.device) / 255


def corrupt(images, name, severity, indices, seed=0):
    """images uint8 (B, 3, n, n) -> likewise; each by its own generator of (seed, index, corruption,
    severity), so that a result does not depend on its batch. `indices` number the images."""
    size = min((224, 64, 32), key=lambda n: abs(n - images.shape[-1]))
    c, x = PARAMETERS[name][size][severity - 1], images.float() / 255

    def drawn(draw):
        """draw(generator) of every image, stacked."""
        key = list(PARAMETERS).index(name)
        seeds = [np.random.SeedSequence((seed, int(i), key, severity)).generate_state(1)[0]
                 for i in indices]
        return torch.stack([draw(torch.Generator().manual_seed(int(s))) for s in seeds]).to(x)

    normal = lambda: drawn(lambda g: torch.randn(x.shape[1:], generator=g))
    if name == "gaussian_noise":
        x = x + c * normal()
    elif name == "shot_noise":
        rate = iter((x * c).cpu())
        x = drawn(lambda g: torch.poisson(next(rate), generator=g)) / c
    elif name == "impulse_noise":
        u = drawn(lambda g: torch.rand(x.shape[1:], generator=g))
        x = torch.where(u < c / 2, 0, torch.where(u < c, 1, x))
    elif name == "speckle_noise":
        x = x + x * c * normal()
    elif name == "gaussian_blur":
        kernel = gaussian_kernel(c, int(4 * c + 0.5))
        x = filtered(filtered(x, kernel, "replicate"), kernel.T, "replicate")
    elif name == "defocus_blur":
        x = filtered(x, disk_kernel(*c), "reflect")
    elif name == "brightness":
        v = x.amax(1, keepdim=True)
        x = torch.where(v > 0, x / v.clamp_min(1e-8), 1) * (v + c).clamp_max(1)
    elif name == "contrast":
        mean = x.mean((2, 3), keepdim=True)
        x = (x - mean) * c + mean
    elif name == "saturate":
        x = saturation(x, *c)
    elif name == "pixelate":
        x = box(x, c)
    else:
        x = jpeg(x, c)
    # The original truncates to 8 bits; 1e-4 of a level keeps what is exact there exact in float32.
    return (x.clamp(0, 1) * 255 + 1e-4).byte()


# --- Data: folder kinds, and which outputs of a model their classes are ---------------------------


@dataclass
class Shift:
    """One test set: images as (path, label), class folders, and a corruption where it is one."""
    name: str
    samples: list
    classes: list
    corruption: str = ""   # "" is clean
    severity: int = 0
    made: bool = False     # corrupted here, rather than read from a published tree


def shifts(folder, corruptions, severities):
    """The test sets of a folder, told by its layout; raises Refusal."""
    folder = Path(folder)
    inner = [folder / n for n in ("val", "test") if (folder / n).is_dir()]
    folder, name = (inner or [folder])[0], folder.name
    published = sorted(d for d in folder.glob("*/[1-5]") if any(d.glob("*/*")))
    if published:
        return [Shift(f"{name}/{d.parent.name}/{d.name}", *image_folder(d), d.parent.name,
                      int(d.name)) for d in published]
    samples, classes = image_folder(folder)
    return [Shift(name, samples, classes)] + [
        Shift(f"{name}/{c}/{s}", samples, classes, c, s, True)
        for c in corruptions for s in severities]


def columns(classes, model):
    """Output index of each class folder: numeric folders are the index itself, others are looked up
    among the model's class names (ImageNet's if 1000 are unnamed). Raises Refusal."""
    outputs, names = model.outputs, model.class_names
    if names is None and outputs == 1000:
        names = timm.data.ImageNetInfo("imagenet-1k").label_names()
    if all(c.isdigit() for c in classes) and not all(n.isdigit() for n in names or ["unnamed"]):
        index = [int(c) for c in classes]
        if max(index) < outputs:
            return index
    if names and set(classes) <= set(names):
        return [list(names).index(c) for c in classes]
    raise Refusal(f"--data has {len(classes)} classes ({', '.join(classes[:3])} ...), {model.name} "
                  f"knows {outputs} ({', '.join((names or ['unnamed'])[:3])} ...)")


# --- Measuring ------------------------------------------------------------------------------------


def load_model(name, config, classes):
    """A plug-in or a network for --model NAME, with .name, .size, .class_names, .outputs (their
    number) and .columns (those of `classes`). Raises Refusal before anything is measured."""
    saved = read_tensors(name) if name.endswith(".pt") else {}
    if isinstance(saved, dict) and saved.get("format") == "robustify plug-in":
        known = set(saved.get("class_names") or classes)
        swap = saved["config"]["zero_shot"] and not set(classes) <= known
        model = load(name, class_names=classes if swap else None)
        model.outputs = model.classes
    else:
        model = load_network(name, config.pretrained)
        if model.classifier is None:
            raise Refusal(f"--model {name}: has no classifier; tune it with robustify.py first")
        model.outputs = len(model.classifier.weight)
    model.name, model.heads_of = Path(name).name.removesuffix(".pt"), getattr(model, "heads", {})
    model.to(config.device, memory_format=torch.channels_last).eval()
    model.columns = torch.tensor(columns(classes, model), device=config.device)
    return model


def measure(models, group, config):
    """Predictions of all models on the shifts that share their images, read once.

    -> [{(model, predictor): (n,) bool}] for each shift; predictor "clean share" tells where the
    clean head was chosen, "oracle" whether clean or unclean is right, "X of all" among all classes.
    """
    size = max(m.size for m in models)
    views = Views(group[0].samples, min(size, 224) if group[-1].made else size, "centre", config)
    if group[0].corruption and not group[0].made:
        views.centre = torch.nn.Identity()  # published images are cropped already
    rows = [{} for _ in group]
    done = 0
    for pixels, labels in measured(views, config, group[0].name):
        indices = range(done, done + len(labels))
        done += len(labels)
        for shift, row in zip(group, rows):
            images = corrupt((pixels * 255).round().byte(), shift.corruption, shift.severity,
                             indices, config.seed) / 255 if shift.made else pixels
            for model in models:
                for key, right in judge(model, images, labels).items():
                    row.setdefault((model.name, key), []).append(right.cpu())
    return [{key: torch.cat(parts).numpy() for key, parts in row.items()} for row in rows]


def judge(model, pixels, labels):
    """{predictor: (B,) bool} of one batch; labels index model.columns."""
    index, right = model.columns, {}
    prediction = model.predict(pixels, with_original=True)
    for name, p in prediction.everyone.items():
        right[name] = p[:, index].argmax(-1) == labels
        if len(index) < model.outputs:
            right[f"{name} of all"] = p.argmax(-1) == index[labels]
    if len(model.heads_of) > 1:
        right["oracle"] = right["clean"] | right["unclean"]
        right["clean share"] = prediction.head == HEADS.index("clean")
    return right


# --- Tables ---------------------------------------------------------------------------------------


def table(header, rows):
    """Aligned Markdown: numbers in percent with one decimal."""
    cells = [[c if isinstance(c, str) else f"{100 * c:.1f}" for c in row]
             for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    line = lambda row: "| " + " | ".join(
        c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
    lines = [line(row) for row in cells]
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    rule = f"|{rule}|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(group, rows, keys, clean=None):
    """[[name, accuracy of each key ...]]: clean, each corruption over severities, their mean; mCE
    where all fifteen are there, relative mCE where also `clean`, the row of the clean set, is."""
    mean = lambda chosen: [np.mean([row[key].mean() for row in chosen]) for key in keys]
    lines = [[s.name, *mean([row])] for s, row in zip(group, rows) if not s.corruption]
    lines += [[f"{s.name}, of all", *([row[m, f"{k} of all"].mean() for m, k in keys])]
              for s, row in zip(group, rows) if all((m, f"{k} of all") in row for m, k in keys)]
    by_name = {}
    for shift, row in zip(group, rows):
        if shift.corruption:
            by_name.setdefault(shift.corruption, []).append(row)
    lines += [[name, *mean(chosen)] for name, chosen in by_name.items()]
    if by_name:
        average = np.mean([mean(c) for c in by_name.values()], axis=0)
        lines.append(["mean of corruptions", *average])
        if "clean share" not in [key for _, key in keys]:
            lines.append(["mean error", *(1 - average)])
    if set(ALEXNET) <= set(by_name):
        error = {c: 1 - np.array(mean(by_name[c])) for c in ALEXNET}
        lines.append(["mCE", *np.mean([error[c] / ALEXNET[c] for c in ALEXNET], axis=0)])
        if clean:
            base = 1 - np.array(mean([clean]))
            lines.append(["relative mCE", *np.mean(
                [(error[c] - base) / (ALEXNET[c] - ALEXNET_CLEAN) for c in ALEXNET], axis=0)])
    return lines


def paired(group, rows, one, other):
    """Mean difference of two predictors over corruptions, and its standard error over images."""
    both = [(row[one].astype(float) - row[other]) for s, row in zip(group, rows) if s.corruption]
    if not both:
        return None
    by_image = np.mean(both, axis=0)
    return by_image.mean(), by_image.std(ddof=1) / math.sqrt(len(by_image))


def report(models, group, rows, clean):
    """Print the tables of one data folder; `clean` is the row of the clean set of its classes."""
    full = [m for m in models if len(m.heads_of) > 1]
    tuned = [m for m in models if m.heads_of]
    final = {m.name: (m.name, "selected" if m.heads_of else "model") for m in models}
    keys = ([(tuned[0].name, "original")] if tuned else []) + list(final.values())
    header = [f"accuracy, {len(group[0].samples)} images"] + (["original"] if tuned else [])
    print("\n" + table(header + [m.name for m in models], summary(group, rows, keys, clean)))
    for m in full:
        names = ["original", *HEADS, "selected", "oracle", "clean share"]
        print(f"\n{m.name}: its heads, rule {m.config.rule}, K = {m.config.passes}")
        print(table(["accuracy", *names], summary(group, rows, [(m.name, k) for k in names])))
        for other in [(m.name, "original"), *(final[o.name] for o in models if o is not m)]:
            found = paired(group, rows, final[m.name], other)
            if found:
                label = other[1] if other[0] == m.name else other[0]
                print(f"{m.name} - {label} on corruptions: {100 * found[0]:+.1f} points, "
                      f"paired standard error {100 * found[1]:.1f}")


def main(arguments=None):
    """The command line; returns the exit code."""
    return command(run, arguments)


def run(arguments):
    """Parse, measure, print; raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--data", nargs="+", default=["demo/val"], help="folders of test images")
    parser.add_argument("--model", nargs="+", default=["robust.pt"],
                        help="plug-ins, networks of --make-teacher, or names")
    parser.add_argument("--pretrained", default="", help="for names, as in robustify.py")
    parser.add_argument("--corrupt", nargs="*", metavar="NAME", help="also corrupt the images: "
                        f"the names given, or {', '.join(PARAMETERS)}")
    parser.add_argument("--severity", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", help="write everything that was measured to this file")
    defaults = Config()
    for name in ("batch_size", "workers", "seed", "device"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(arguments)
    if not arguments:
        args.model = [f"demo/{n}.pt" for n in ("teacher", "apt", "ours")]
        args.corrupt, args.severity = DEMO, [3, 5]
        if not Path("demo/ours.pt").is_file():
            raise Refusal("demo/ours.pt: no such file; make it with: python robustify.py")
    corruptions = [] if args.corrupt is None else args.corrupt or list(PARAMETERS)
    for name in corruptions:
        if name not in PARAMETERS:
            raise Refusal(f"--corrupt {name}: choose from {', '.join(PARAMETERS)}")
    if not set(args.severity) <= {1, 2, 3, 4, 5}:
        raise Refusal("--severity: from 1 to 5")
    config = replace(defaults, batch_size=args.batch_size, workers=args.workers, seed=args.seed,
                     device=args.device, pretrained=args.pretrained)
    if len({Path(name).name for name in args.model}) < len(args.model):
        raise Refusal("--model: two files have the same name; the tables could not tell them apart")
    folders = [shifts(folder, corruptions, args.severity) for folder in args.data]
    written, clean = [], {}
    for group in folders:
        models = [load_model(name, config, group[0].classes) for name in args.model]
        made = ", corrupted here in memory" if group[-1].made else ""
        print(f"{group[0].name}: {len(group[0].samples)} images, {len(group[0].classes)} classes, "
              f"{len(group)} sets{made}")
        same = all(s.made or not s.corruption for s in group)
        rows = measure(models, group, config) if same else \
            [measure(models, [shift], config)[0] for shift in group]
        if not group[0].corruption:
            clean.setdefault(tuple(group[0].classes), rows[0])
        report(models, group, rows, clean.get(tuple(group[0].classes)))
        written += [{"name": s.name, "n": len(s.samples), "corrupted_here": s.made, "models": {
            m.name: {k: float(right.mean()) for (name, k), right in row.items() if name == m.name}
            for m in models}} for s, row in zip(group, rows)]
    if args.json:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "torchvision": torchvision.__version__, "timm": timm.__version__}
        Path(args.json).write_text(json.dumps(
            {"sets": written, "arguments": vars(args), "seed": args.seed, "versions": versions},
            indent=1))
    if not arguments:
        print("\nWhat to see: the teacher breaks least under corruption; ours carries some of that "
              "into the student,\nand chooses the clean head more often where images are clean.")


if __name__ == "__main__":
    sys.exit(main())

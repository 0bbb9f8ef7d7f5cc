"""Measure networks and robustify.py's plug-ins under distribution shift (Secs. 3 and 5).

    python eval.py                                                # what the demo left in demo/
    python eval.py --data imagenet-c/                             # --model robust.pt
    python eval.py --data imagenet/ imagenetv2/ imagenet-r/ imagenet-c/ --model apt.pt robust.pt
    python eval.py --data objectnet/ --corrupt --frost frost/     # ObjectNet-C, made in memory
    python eval.py --data imagenet-c/ --model ft.pt --alpha 0 .25 .5 .75 1             # WiSE-FT
    python eval.py --data imagenet-c/ --model resnet50 ViT-B-32 --plot severity.png    # Sec. 3
    python eval.py --transfer flowers/                            # linear probes, Tables 1 and 3
    python eval.py --cost                                         # GMACs and milliseconds

What a model scores depends on the model, the folder and the flags, not on what else is in the run.
A folder is recognised by its layout, and its classes are looked up among a model's:

    layout                      what it is
    CORRUPTION/SEVERITY/CLASS/  published corruptions: all, in groups (blur/defocus_blur/), one
                                corruption, or one severity; its images are used as they are
    images/, mappings/          ObjectNet: classes that ImageNet has too, without the red border
    CLASS/                      images, also in val/ or test/; --corrupt corrupts them here

    the folder's classes    model of ImageNet (a)  model of other names   zero-shot model (b)
    wnids (n01440764)       by wnid                by name, or refused    ImageNet's 1000 (c)
    numbers (ImageNetV2)    number -> wnid         number -> wnid ->      ImageNet's 1000 (c)
                                                   name, or refused (d)
    ObjectNet's             mappings -> wnid       mappings -> wnid ->    ImageNet's 1000 (c)
                                                   name, or refused
    other names             refused                by name, or refused    its new classes (c)

(a) A library's network with 1000 outputs. (b) CLIP without a classifier, or a plug-in of
--zero-shot; (c) a plug-in its own classes where it has them; wnids that are not ImageNet's are
refused, for they are no words. (d) As they are where its own names are numbers. Outputs without
names are taken in the order of the folders, where there are as many. One class alone is refused.

Small squares (CIFAR) are seen whole, published corruptions as they are, other images after Resize
256, CenterCrop 224, or likewise for the model's input size. Corruptions are made here at 224 px, or
at the size of small squares. On a GPU networks compute in bfloat16. A folder with fewer classes
than the model is decided among them; "of all" counts all outputs. Of a plug-in every predictor is
measured in one pass: the original, each head, the one that Eq. 6 selects, and the oracle, which is
right where the clean or the unclean head is. A val/ or test/ of exactly a model's classes is no
shift for it, and not in the average.

[2] Barbu et al.: ObjectNet. [11] Hendrycks, Dietterich: Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations (ImageNet-C, mCE).
"""

import argparse
import functools
import importlib.util
import io
import itertools
import json
import math
import re
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import robustify
from robustify import (HEADS, PROCESSES, RANK, RECIPES, ClassTokenBlock, Config, Refusal,
                       assemble, autocast, batches, beside, can_be_written, centre_crop,
                       count_parameters, dropout_masks, fingerprint, image_folder, interpolated,
                       is_checkpoint, join_processes, linear_probe, load, load_network,
                       load_original, read_checkpoint, read_image, refuse, replace_file,
                       set_classes, student_loss)

IMAGENET = timm.data.ImageNetInfo().label_names()  # wnids, in the order of the outputs
ALEXNET = {  # top-1 error of AlexNet on ImageNet-C [11], for mCE
    "gaussian_noise": .886428, "shot_noise": .894468, "impulse_noise": .922640,
    "defocus_blur": .819880, "glass_blur": .826268, "motion_blur": .785948, "zoom_blur": .798360,
    "snow": .866816, "frost": .826572, "fog": .819324, "brightness": .564592, "contrast": .853204,
    "elastic_transform": .646056, "pixelate": .717840, "jpeg_compression": .606500}
ALEXNET_CLEAN = .43478
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
             "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}

# --- One batch is judged, one folder is measured --------------------------------------------------

@dataclass
class Column:
    """A column of the tables, and the model behind it."""
    name: str
    kind: str                  # "network", "plug-in", or "original": what plug-ins were tuned from
    model: nn.Module
    classes: list              # the names of its outputs, None where they are unknown
    count: int = 0             # of outputs
    zero_shot: bool = False    # takes other classes
    embeddings: dict = field(default_factory=dict)  # class names -> (text embeddings, scale)
    original: object = None    # of a plug-in: the column of what it was tuned from
    path: str = ""             # of a plug-in: its file
    outputs: torch.Tensor = None  # (classes of the folder at hand, m), see class_outputs

@dataclass
class TestSet:
    """Images under one corruption, or none."""
    samples: list              # (path, label)
    corruption: str = ""
    severity: int = 0
    made: bool = False         # corrupted here, not published so

@dataclass
class Folder:
    """What one --data names."""
    name: str
    kind: str                  # "classes", "objectnet" or "published"
    classes: list              # class folders; a label is the place of one
    sets: list                 # of TestSet
    averaged: list = field(default_factory=list)  # corruptions that enter the mean
    missing: list = field(default_factory=list)  # (corruption, severity) that are not there
    held_out: bool = False     # val/ or test/: no shift for a model of its classes
    wnids: dict = None         # ObjectNet: class folder -> classes of ImageNet
    results: list = field(default_factory=list)  # of (TestSet, {(column, predictor): (n,) bool})

def predict(column, pixels, z):
    """({predictor: (B, C) probabilities}, the head that was chosen (B,) or None) of one model; z is
    what M_b gives, of a plug-in or its original. "answer" is what the model says."""
    if column.kind == "network":
        return {"answer": column.model(pixels).float().softmax(-1)}, None
    if column.kind == "original":
        return {"answer": column.model.original_probabilities(z)}, None
    prediction = column.model.predict_from(z)
    if len(prediction.phi) == 1:
        return {"answer": prediction.probabilities}, None
    return {"answer": prediction.probabilities, **prediction.phi}, prediction.head

@torch.no_grad()
def judge(groups, images, labels, args):
    """One batch through all models: images {input size: uint8 (B, 3, n, n)}, labels (B,) ->
    {(column, predictor): (B,) bool}, right or wrong ("clean share": chosen or not). A group of
    columns shares M_b, which runs once. "of all" is the answer among all outputs; --average adds
    the mean of the models' probabilities of these classes."""
    right = {}
    answers = []
    for group in groups:
        pixels = images[group[0].model.size] / 255
        with autocast(args.device):
            z = None
            if group[0].kind != "network":
                z = group[0].model.backbone(pixels)
            predicted = [predict(column, pixels, z) for column in group]
        for column, (predictors, head) in zip(group, predicted):
            for predictor, p in predictors.items():
                of_class = p[:, column.outputs].amax(-1)    # the best of the outputs that mean it
                right[column.name, predictor] = of_class.argmax(-1) == labels
                if predictor == "answer":
                    best = p.argmax(-1, keepdim=True)
                    right[column.name, "of all"] = (column.outputs[labels] == best).any(-1)
                    if column.kind != "original":
                        tiny = torch.finfo(of_class.dtype).tiny
                        total = of_class.sum(-1, keepdim=True).clamp_min(tiny)
                        answers.append(of_class / total)    # probabilities among these classes
            if head is not None:
                oracle = right[column.name, "clean"] | right[column.name, "unclean"]
                right[column.name, "oracle"] = oracle
                right[column.name, "clean share"] = head == HEADS.index("clean")
    if args.average:
        right["average", "answer"] = torch.stack(answers).mean(0).argmax(-1) == labels
    return right

def measure(folder, columns, args):
    """Yields (TestSet, {(column, predictor): (n,) bool}) for each set of a folder, when done.

    Sets that share their images are measured together: an image is read once, corrupted once for
    all models, and each sees it at its own size. Under torchrun a process judges its share."""
    for column in columns:
        set_outputs(column, folder, args)
    groups = grouped(columns)
    sizes = {column.model.size for column in columns}
    together = [[test_set] for test_set in folder.sets]
    if folder.kind in ("classes", "objectnet"):
        together = [folder.sets]
    for sets in together:
        pictures = Pictures(sets[0].samples, sizes, folder.kind, sets[-1].made)
        n = len(pictures)
        rows = [{} for _ in sets]
        title = f"{folder.name} {sets[-1].corruption}".strip()
        share = batches(pictures, range(RANK, n, PROCESSES), args.batch_size, args.workers)
        with tqdm(desc=title, total=n * len(sets), unit=" images", mininterval=2,
                  disable=RANK > 0) as bar:
            for views, labels, indices in share:
                views = {size: view.to(args.device) for size, view in views.items()}
                labels = labels.to(args.device)
                for test_set, row in zip(sets, rows):
                    images = {size: views[pictures.side or size] for size in sizes}
                    if test_set.made:
                        source = views[pictures.side or 224]
                        images = dict.fromkeys(sizes, make(test_set, source, indices, args))
                    for key, right in judge(groups, images, labels, args).items():
                        row.setdefault(key, np.zeros(n, bool))[indices] = right.cpu()
                    bar.update(len(labels) * PROCESSES)
        yield from zip(sets, gathered(rows))

def make(test_set, images, indices, args):
    """The images uint8 (B, 3, n, n) under the set's corruption."""
    images = corrupt(images, test_set.corruption, test_set.severity, indices, args.seed, args.frost)
    if args.jpeg:
        images = jpeg(images, 85)  # in which the published test sets were saved
    return images

def gathered(rows):
    """Rows [{key: (n,) bool}] of all processes in one: each image was judged by one of them."""
    if PROCESSES == 1:
        return rows
    everyone = [None] * PROCESSES
    torch.distributed.all_gather_object(everyone, rows)
    merged = [{} for _ in rows]
    for other in everyone:
        for row, part in zip(merged, other):
            for key, right in part.items():
                row[key] = row.get(key, False) | right
    return merged

# --- Images, and the views that models have of them -----------------------------------------------

class Pictures(Dataset):
    """index -> ({n: uint8 (3, n, n)}, label, index), one view for each input size in the run.

    Where most images are squares of one size below 224 px, all are seen whole, at that size
    (`side`); published corruptions likewise at any size. A model resizes inside itself.
    `corrupted`: they are to be corrupted here, at 224 px.
    """

    def __init__(self, samples, sizes, kind="classes", corrupted=False):
        self.samples = samples
        self.border = 2 * (kind == "objectnet")  # its red border of 1 px, which JPEG smears
        self.side = common_side(samples)
        if kind == "published":
            self.side = self.side or 224
        elif self.side >= 224:
            self.side = 0
        if self.side:
            self.side -= 2 * self.border
            whole = v2.Compose([v2.Resize(self.side), v2.CenterCrop(self.side)])
            self.views = {self.side: whole}  # of an image of that size, itself
        else:
            self.views = {size: centre_crop(size) for size in sizes}
            if corrupted:
                self.views[224] = centre_crop(224)  # as ImageNet-C was made

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = read_image(path)
        if self.border:
            image = image[:, self.border:-self.border, self.border:-self.border]
        return {size: view(image) for size, view in self.views.items()}, label, index

def common_side(samples):
    """n where most images are n x n pixels, judged by the headers of 25 to 50 of them, else 0."""
    sizes = []
    for path, _ in samples[::max(1, len(samples) // 25)]:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except Exception:  # of a broken file, which read_image will refuse by name
            sizes.append((0, 0))
    width, height = statistics.mode(sizes)
    if width != height or 2 * sizes.count((width, height)) <= len(sizes):
        return 0
    return width

# --- Folder kinds ---------------------------------------------------------------------------------

def read_folder(path, name, args):
    """The Folder of one --data, its kind recognised by its layout; raises Refusal."""
    path = Path(path).resolve()
    cells = severity_folders(path)
    if cells:
        folder = published_folder(path, name, cells, args)
    elif (path / "mappings").is_dir():
        folder = objectnet_folder(path, name)
    else:
        part = existing(path, "val", "test")
        samples, classes = image_folder(part)
        if set(classes) <= {*CORRUPTIONS, "spatter"}:
            raise Refusal(f"{path}: holds corruptions ({classes[0]} ...) without severities 1-5")
        folder = Folder(name, "classes", classes, [TestSet(samples)])
        folder.held_out = part.name in ("val", "test")
    if args.corrupt and folder.kind == "published":
        raise Refusal(f"--corrupt: {path} is corrupted already; measure it in a run of its own")
    for corruption in args.corrupt:
        for severity in args.severity:
            folder.sets.append(TestSet(folder.sets[0].samples, corruption, severity, made=True))
    folder.averaged = folder.averaged or args.corrupt
    if set(FIFTEEN) <= set(args.corrupt):
        folder.averaged = list(FIFTEEN)
    return folder

def existing(path, *names):
    """The first of path/NAME that is a folder, else the path itself."""
    for name in names:
        if Path(path, name).is_dir():
            return Path(path, name)
    return Path(path)

def severity_folders(path):
    """{(corruption, severity): folder} of ImageNet-C's layout, or of a part of it; {} of others."""
    if path.parent.name in [*CORRUPTIONS, "spatter"] and path.name in list("12345"):
        return {(path.parent.name, int(path.name)): path}
    found = {}
    for depth in ("", "*/", "*/*/"):
        for folder in sorted(path.glob(f"{depth}[1-5]")):
            if any(folder.glob("*/*")):
                found[folder.parent.name, int(folder.name)] = folder
    return found

def published_folder(path, name, cells, args):
    """Folder of ImageNet-C's layout; cells that are not there are kept as `missing`."""
    corruptions = sorted({corruption for corruption, _ in cells})
    severities = args.severity
    if len(cells) == 1 and path in cells.values():
        severities = [int(path.name)]
    elif len(corruptions) > 1 and set(corruptions) & set(FIFTEEN):
        corruptions = sorted({*corruptions, *FIFTEEN})
    found = {}
    missing = []
    for cell in itertools.product(corruptions, severities):
        if cell in cells:
            found[cell] = image_folder(cells[cell])
        else:
            missing.append(cell)
    if not found:
        raise Refusal(f"--severity: {path} has none of {severities}")
    classes = sorted(set().union(*[own for _, own in found.values()]))
    place = {label: i for i, label in enumerate(classes)}
    sets = []
    for (corruption, severity), (samples, own) in found.items():
        samples = [(image, place[own[label]]) for image, label in samples]
        sets.append(TestSet(samples, corruption, severity))
    present = dict.fromkeys(test_set.corruption for test_set in sets)
    fifteen = [corruption for corruption in present if corruption in FIFTEEN]
    return Folder(name, "published", classes, sets, fifteen or list(present), missing)

def objectnet_folder(path, name):
    """Folder of ObjectNet: those of its classes that ImageNet has too. The four files of its own
    mappings [2] lead from a folder to a label, the names of its ImageNet classes, the lines of
    these in a list, and the outputs of an ImageNet network."""
    mappings = path / "mappings"
    wnids = {}
    try:
        label_of = json.loads((mappings / "folder_to_objectnet_label.json").read_text())
        names_of = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text())
        lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
        line_of = json.loads((mappings / "pytorch_to_imagenet_2012_id.json").read_text())
        output_of = {lines[line].strip(): int(output) for output, line in line_of.items()}
        for label, names in names_of.items():
            wnids[label] = [IMAGENET[output_of[name]] for name in names.split("; ")]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise Refusal(f"{path}/mappings: not ObjectNet's files ({error})") from error
    samples, folders = image_folder(existing(path, "images"))
    shared = [f for f in folders if label_of.get(f) in wnids]
    if not shared:
        raise Refusal(f"{path}: none of its folders is a class that ImageNet has too")
    place = {f: i for i, f in enumerate(shared)}
    samples = [(image, place[folders[k]]) for image, k in samples if folders[k] in place]
    folder = Folder(name, "objectnet", shared, [TestSet(samples)])
    folder.wnids = {f: wnids[label_of[f]] for f in shared}
    return folder

# --- Class mapping: which outputs of a model mean a class of the folder ---------------------------

def class_outputs(folder, column):
    """(names of the model's outputs, [outputs that mean it] for each class of the folder): the
    table above. Only a zero-shot model's names can change. Raises Refusal."""
    if len(folder.classes) == 1:
        raise Refusal(f"{folder.name}: one class ({folder.classes[0]}); there is nothing to decide")
    own = column.classes or []
    if names_none(column, folder):
        own = folder.classes
    numbered = all(name.isdecimal() for name in folder.classes)
    wanted = {name: [name] for name in folder.classes}
    if folder.wnids:
        wanted = folder.wnids
    elif numbered and not set(folder.classes) <= set(own):
        if max(map(int, folder.classes)) > 999:
            raise Refusal(f"{folder.name}: not all of {shortened(folder.classes)} are among "
                          "ImageNet's outputs 0 to 999")
        wanted = {name: [IMAGENET[int(name)]] for name in folder.classes}
    every = list(itertools.chain(*wanted.values()))
    names = own
    if column.zero_shot and not set(every) <= set(own):
        names = new_classes(every, folder)
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in every if name not in place]
    if unknown:
        raise Refusal(f"{folder.name} has {len(folder.classes)} classes ({shortened(every)}); "
                      f"{column.name}, which knows {column.count} ({shortened(own)}), lacks "
                      f"{len(unknown)} ({shortened(unknown)})")
    return names, [[place[name] for name in wanted[label]] for label in folder.classes]

def names_none(column, folder):
    """Whether the outputs of a network are taken in the order of the folders: it does not name
    them, there are as many, and the folders have names."""
    if column.zero_shot or column.classes is not None or folder.wnids:
        return False
    has_names = not all(name.isdecimal() for name in folder.classes)
    return has_names and column.count == len(folder.classes)

def new_classes(names, folder):
    """What a zero-shot model decides among: ImageNet's 1000, or these names; raises Refusal."""
    if set(names) <= set(IMAGENET):
        return IMAGENET
    for name in names:
        if name.isdecimal() or re.fullmatch(r"n\d{8}", name):
            raise Refusal(f"{folder.name}: {name} is no word, and not all of {shortened(names)} "
                          "are ImageNet's")
    return names

def shortened(names):
    """The first three of a list, for a message."""
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)

def set_outputs(column, folder, args):
    """Set the outputs that mean the folder's classes, of a zero-shot model also its classes. A
    plug-in keeps the embeddings that it was tuned with, unless --templates are given."""
    names, outputs = class_outputs(folder, column)
    if column.zero_shot:
        key = tuple(names)
        if key not in column.embeddings:
            templates = TEMPLATES.get(args.templates or "openai", [args.templates])
            column.embeddings[key] = column.model.text_embeddings(names, templates, args.device)
        set_classes(column.model, names, *column.embeddings[key])
        column.model.to(args.device)
        column.count = len(names)
    widest = max(len(some) for some in outputs)
    rows = [(some * widest)[:widest] for some in outputs]  # repeats do not change the maximum
    column.outputs = torch.tensor(rows, device=args.device)

# --- Models ---------------------------------------------------------------------------------------

def load_columns(args):
    """The columns that --model, --alpha, --rule and --passes ask for, first one for each original
    that plug-ins were tuned from. Equal backbones are kept once. Raises Refusal."""
    columns = []
    originals = {}
    backbones = {}
    for path, name in zip(args.model, short_names("--model", args.model)):
        is_file = is_checkpoint(path)
        if not is_file or read_checkpoint(path, "any")["format"] != "robustify plug-in":
            has_weights = is_file or ":" in path
            pretrained = "" if has_weights else args.pretrained
            columns.append(plain_column(path, name, args, pretrained))
            continue
        student = load(path).to(args.device)
        if Path(f"{path}.state").is_file() and RANK == 0:
            print(f"{path}: its training did not end; {path}.state is there")
        teacher = beside(path, student.config.teacher)
        if args.cost and teacher.endswith(".pt") and not Path(teacher).is_file():
            raise Refusal(f"--cost: needs {teacher}, the teacher of {path}")
        network = nn.Sequential(*student.backbone, *student.original[0], *student.original[1])
        whole = student.size, str(network), fingerprint(network)  # wherever it is cut
        if whole not in originals:
            originals[whole] = student_column(f"original of {name}", "original", student, args)
        frozen = student.size, str(student.backbone), fingerprint(student.backbone)
        student.backbone = backbones.setdefault(frozen, student.backbone)
        for label, variant in variants(student, name, args):
            column = student_column(label, "plug-in", variant, args)
            column.original = originals[whole]
            column.embeddings = column.original.embeddings
            column.path = path
            columns.append(column)
    if len(originals) == 1:
        for column in originals.values():
            column.name = "original"
    columns = [*originals.values(), *columns]
    if len({column.name for column in columns}) < len(columns):
        raise Refusal("two columns would have one name: rename a file, or give a value once")
    return columns

def plain_column(path, name, args, pretrained):
    """Column of a network by name or file; raises Refusal. A CLIP takes text for a classifier."""
    network = load_network(path, pretrained).to(args.device)
    column = Column(name, "network", network, network.class_names)
    if network.classifier is not None:
        column.count = len(network.classifier.weight)
        if column.classes is None and column.count == 1000:
            column.classes = IMAGENET
    elif network.text_embeddings is not None:
        column.zero_shot = True
    elif args.data:
        raise Refusal(f"--model {path}: has no classifier; robustify.py --recipe lp fits one")
    return column

def student_column(name, kind, student, args):
    """Column of a plug-in, or of its original."""
    column = Column(name, kind, student, student.class_names, student.classes)
    column.zero_shot = student.config.zero_shot
    if column.zero_shot and not args.templates:
        classifier = student.original[1][-1]
        key = tuple(student.class_names)
        column.embeddings[key] = (classifier.weight.clone(), classifier.scale.clone())
    return column

def variants(student, name, args):
    """Yields (name, student) for each of --alpha, --rule and --passes, from one load."""
    config = student.config
    rules = args.rule if len(student.heads) > 1 else []
    if not (args.alpha or rules or args.passes):
        yield name, student
        return
    width = student.masks.shape[1]
    for alpha, rule, passes in itertools.product(
            args.alpha or [1.0], rules or [config.rule], args.passes or [config.passes]):
        label = name
        if args.alpha:
            label += f" alpha {alpha:g}"
        if rules:
            label += f" {rule}"
        if args.passes:
            label += f" K {passes}"
        variant = interpolated(student, alpha)
        variant.config = replace(config, rule=rule, passes=passes)
        variant.masks = dropout_masks(variant.config, width).to(student.masks.device)
        yield label, variant

def grouped(columns):
    """Lists of columns: those with one backbone together, a plain network alone."""
    groups = {}
    for column in columns:
        key = id(column.model)
        if column.kind != "network":
            key = id(column.model.backbone)
        groups.setdefault(key, []).append(column)
    return list(groups.values())

def short_names(flag, paths):
    """The shortest ends of the paths that tell them apart and are no name of ours; raises Refusal
    where one is given twice."""
    parts = [Path(path).absolute().parts for path in paths]
    longest = max(map(len, parts), default=1)
    for suffix, length in itertools.product((".pt", ""), range(1, longest + 1)):
        names = ["/".join(part[-length:]).removesuffix(suffix) for part in parts]
        if len(set(names)) == len(names) and not {"original", "average"} & set(names):
            return names
    raise Refusal(f"{flag}: two of {', '.join(paths)} are the same")

# --- Metrics and tables ---------------------------------------------------------------------------

def accuracies(folder, keys):
    """{(corruption, severity): (keys,)}, from 0 to 1; NaN where a model has no such predictor."""
    found = {}
    for test_set, row in folder.results:
        values = [row[key].mean() if key in row else np.nan for key in keys]
        found[test_set.corruption, test_set.severity] = np.array(values)
    return found

def mean_of(cells, corruptions, severity=None):
    """(keys,) of cells {(corruption, severity): (keys,)}: the mean over a corruption's severities,
    or one of them, then over corruptions."""
    means = []
    for name in corruptions:
        own = [cell for (corruption, level), cell in cells.items()
               if corruption == name and severity in (None, level)]
        if own:
            means.append(np.mean(own, axis=0))
    return np.mean(means, axis=0)

def measured_corruptions(folder):
    """Those that enter the mean, as far as they were measured."""
    done = {test_set.corruption for test_set, _ in folder.results}
    return [name for name in folder.averaged if name in done]

def mce(cells, clean=None):
    """(keys,): the mean over the fifteen of error / AlexNet's error [11]; with the clean accuracy
    (keys,) the relative mCE, of what corruption adds to the error."""
    ratios = []
    for name, alexnet in ALEXNET.items():
        error = 1 - mean_of(cells, [name])
        if clean is None:
            ratios.append(error / alexnet)
        else:
            ratios.append((error - (1 - clean)) / (alexnet - ALEXNET_CLEAN))
    return np.mean(ratios, axis=0)

def summary(folder, keys):
    """Rows [label, a number for each key] from 0 to 1: the images as they are, each corruption,
    each severity, the mean over corruptions."""
    cells = accuracies(folder, keys)
    averaged = measured_corruptions(folder)
    rows = []
    if ("", 0) in cells:
        rows.append([folder.name, *cells["", 0]])
    for name in dict.fromkeys(corruption for corruption, _ in cells if corruption):
        rows.append([name, *mean_of(cells, [name])])
    severities = sorted({severity for name, severity in cells if name in averaged})
    if len(severities) > 1:
        for severity in severities:
            rows.append([f"severity {severity}", *mean_of(cells, averaged, severity)])
    if averaged:
        label = f"mean of {len(averaged)} corruptions"
        if set(averaged) == set(FIFTEEN):
            label = "mean of the fifteen"
        rows.append([label, *mean_of(cells, averaged)])
    return rows

def errors(folder, folders, keys):
    """Rows of the mean error and, for ImageNet's classes under all fifteen at five severities, mCE;
    relative mCE where the clean images are measured in the same run."""
    cells = accuracies(folder, keys)
    averaged = measured_corruptions(folder)
    if not averaged:
        return []
    rows = [["mean error", *(1 - mean_of(cells, averaged))]]
    is_imagenet = folder.kind == "published" or folder.held_out
    every = set(itertools.product(FIFTEEN, range(1, 6)))
    if not is_imagenet or set(folder.classes) != set(IMAGENET) or not every <= set(cells):
        return rows
    rows.append(["mCE", *mce(cells)])
    for other in folders:
        clean = accuracies(other, keys).get(("", 0))
        if other.held_out and set(other.classes) == set(IMAGENET) and clean is not None:
            return [*rows, ["relative mCE", *mce(cells, clean)]]
    return rows

def paired(folder, corruptions, one, other):
    """Accuracy of one column minus another's, image by image, in points, +- 2 standard errors."""
    means = []
    for name in corruptions:
        own = [row[one, "answer"].astype(float) - row[other, "answer"]
               for test_set, row in folder.results if test_set.corruption == name]
        if len({len(differences) for differences in own}) != 1:
            return "-"  # no pairs where sets hold different images
        means.append(np.mean(own, axis=0))
    if len({len(differences) for differences in means}) != 1 or len(means[0]) < 2:
        return "-"
    return with_error(np.mean(means, axis=0))

def with_error(difference):
    """The mean of differences (n,), one an image, in points, +- 2 standard errors."""
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return f"{100 * difference.mean():+.1f} +- {200 * error:.1f}"

def table(header, rows):
    """Aligned Markdown; numbers from 0 to 1 become percent with one decimal."""
    lines = [header]
    for row in rows:
        lines.append([cell if isinstance(cell, str) else f"{100 * cell:.1f}" for cell in row])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines.insert(1, rule)
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)

def show(args, header, rows):
    """Print a table, and keep it for --json; a NaN, of what a model does not have, becomes "-"."""
    kept = [header]
    for row in rows:
        kept.append(["-" if cell != cell else cell for cell in row])
    args.tables.append(kept)
    print("\n" + table(header, kept[1:]), flush=True)

def answering(columns, args):
    """Names of all that answer: the columns, and with --average their mean."""
    return [column.name for column in columns] + ["average"] * args.average

def report(folder, folders, columns, args):
    """Print the tables of a folder, as far as it was measured."""
    names = answering(columns, args)
    keys = [(name, "answer") for name in names]
    n = len(folder.results[0][0].samples)
    partial = " (partial)" * (len(folder.results) < len(folder.sets))
    rows = summary(folder, keys) + errors(folder, folders, keys)
    of_all = accuracies(folder, [(name, "of all") for name in names]).get(("", 0))
    if of_all is not None and any(len(folder.classes) < column.count for column in columns):
        rows.insert(1, ["  of all", *of_all])
    show(args, [f"accuracy, {n} images{partial}", *names], rows)
    for column in columns:
        if column.kind == "plug-in" and len(column.model.heads) > 1:
            predictors = [*HEADS, "answer", "oracle", "clean share"]
            keys = [(column.original.name, "answer"), *[(column.name, p) for p in predictors]]
            show(args, [column.name, "original", *HEADS, "selected", "oracle", "clean share"],
                 summary(folder, keys))
    pairs = []
    for i, column in enumerate(columns):
        if column.kind == "plug-in":
            pairs += [(column.name, other) for other in names[:i]]
    if args.average:
        pairs += [("average", column.name) for column in columns]
    rows = []
    for one, other in pairs:
        rows.append([f"{one} minus {other}", paired(folder, [""], one, other),
                     paired(folder, folder.averaged, one, other)])
    if rows:
        show(args, ["points, +- 2 paired standard errors", "as they are", "corrupted"], rows)

def average_of_shifts(folders, columns, args):
    """Print the column "Avg. shifts" of Tables 1 to 3: the average over folders, a corrupted one by
    its mean over corruptions; a model's own test set, where it is one, is no shift for it."""
    names = answering(columns, args)
    keys = [(name, "answer") for name in names]
    rows = []
    is_shift = []
    for folder in folders:
        cells = accuracies(folder, keys)
        if ("", 0) in cells:
            rows.append([folder.name, *cells["", 0]])
            shifts = []
            for column in columns:
                knows = set(folder.classes) == set(column.classes or IMAGENET)
                is_own = folder.held_out and (knows or names_none(column, folder))
                shifts.append(not is_own)
            is_shift.append(shifts + [all(shifts)] * args.average)
        if measured_corruptions(folder):
            suffix = "-C" * any(test_set.made for test_set in folder.sets)
            rows.append([folder.name + suffix, *mean_of(cells, measured_corruptions(folder))])
            is_shift.append([True] * len(names))
    if len(folders) < 2 or np.sum(is_shift, axis=0).max(initial=0) < 2:
        return
    accuracy = np.array([row[1:] for row in rows])
    average = np.ma.masked_array(accuracy, np.logical_not(is_shift)).mean(0).filled(np.nan)
    rows.append(["average of shifts", *average])
    rows.append(["its error", *(1 - average)])
    show(args, ["accuracy", *names], rows)

def write_json(folders, columns, args, partial):
    """Everything that was measured, with what is needed to repeat it."""
    sets = []
    for folder in folders:
        for test_set, row in folder.results:
            accuracy = {name: {} for name, _ in row}
            for (name, predictor), right in row.items():
                accuracy[name][predictor] = float(right.mean())
            sets.append({"folder": folder.name, "corruption": test_set.corruption,
                         "severity": test_set.severity, "made": test_set.made,
                         "n": len(test_set.samples), "classes": len(folder.classes),
                         "accuracy": accuracy})
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, open_clip, timm)}
    models = {}
    for column in columns:
        models[column.name] = {"size": column.model.size}
        if column.kind != "network":
            models[column.name]["config"] = asdict(column.model.config)
    own = {name: value for name, value in vars(args).items() if name != "tables"}
    content = {"partial": partial, "sets": sets, "missing": {f.name: f.missing for f in folders},
               "tables": args.tables, "arguments": own, "models": models, "versions": versions}
    text = json.dumps(content, indent=1, default=float)
    replace_file(Path(args.json).resolve(), text.encode())

def plot(folders, columns, args):
    """Accuracy, and the share of the clean head, against severity (Figure 3); 0 is uncorrupted."""
    import matplotlib
    from matplotlib.figure import Figure
    panels = {"answer": "accuracy (%)"}
    if any(column.kind == "plug-in" and len(column.model.heads) > 1 for column in columns):
        panels["clean share"] = "clean head chosen (%)"
    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(columns)))
    for (predictor, title), axis in zip(panels.items(), axes):
        for folder, style in zip(folders, itertools.cycle(("-", "--", ":", "-."))):
            averaged = measured_corruptions(folder)
            for column, colour in zip(columns, colours):
                cells = accuracies(folder, [(column.name, predictor)])
                severities = sorted({level for name, level in cells if name in ["", *averaged]})
                values = []
                for severity in severities:
                    names = averaged if severity else [""]
                    values.append(100 * mean_of(cells, names, severity)[0])
                if averaged and not np.isnan(values).any():
                    label = f"{column.name}, {folder.name}"
                    axis.plot(severities, values, style, marker="o", color=colour, label=label)
        axis.set(xlabel="severity, 0 is uncorrupted", ylabel=title, xticks=range(6))
        axis.legend(fontsize="small")
    figure.savefig(args.plot)

# --- Transfer (Tables 1 and 3): linear probes -----------------------------------------------------

def features(column, pixels):
    """{name: (B, D)}: of a network, what its classifier sees; of a plug-in, "original" and where
    tuning has acted: pooled activations after the shared section, or where nothing is shared what
    the classifier of each head sees."""
    model = column.model
    if column.kind == "network":
        return {"features": model.features(pixels)}
    z = model.backbone(pixels)
    if len(model.shared):
        before = model.original[0](z)
        after = model.shared(z)
        return {"original": pooled(model, before), "tuned": pooled(model, after)}
    found = {"original": model.original[1][:-1](z)}
    for name, head in model.heads.items():
        found[f"{name} head"] = head.features(z)
    return found

def pooled(student, h):
    """Activations of any shape -> (B, D): the class token, else the mean over places."""
    if h.ndim == 4:
        return h.mean((2, 3))
    if h.ndim == 3 and student.class_token:
        return h[:, 0]
    if h.ndim == 3:
        return h.mean(1)
    return h

@torch.no_grad()
def features_of(samples, column, args):
    """({name: (n, D)}, labels (n,)) of images, on the views that are measured. Under torchrun each
    process takes all of them."""
    pictures = Pictures(samples, [column.model.size])
    found = []
    every = []
    loader = batches(pictures, range(len(pictures)), args.batch_size, args.workers)
    for views, labels, _ in tqdm(loader, "batches of features", mininterval=2, disable=RANK > 0):
        pixels = views[pictures.side or column.model.size].to(args.device) / 255
        with autocast(args.device):
            found.append(features(column, pixels))
        every.append(labels.to(args.device))
    names = found[0]
    return {name: torch.cat([f[name].float() for f in found]) for name in names}, torch.cat(every)

def probe_answers(known, labels, unseen, classes):
    """Answers (m,) to features `unseen` (m, D) of a linear layer fitted to `known` (n, D), both
    standardised by the latter."""
    mean = known.mean(0)
    std = known.std(0, correction=0).clamp_min(1e-6)
    probe = nn.Linear(known.shape[1], classes, device=known.device)
    linear_probe((known - mean) / std, labels, probe)
    with torch.no_grad():
        return probe((unseen - mean) / std).argmax(-1)

def transfer_sets(path):
    """(train samples, test samples, classes) of a --transfer folder; raises Refusal."""
    train, classes = image_folder(Path(path, "train"))
    test, others = image_folder(existing(path, "val", "test"))
    if classes != others:
        raise Refusal(f"--transfer {path}: needs train/ and val/ with the same classes")
    return train, test, classes

def transfer(name, sets, columns, args):
    """Linear probes fitted and tested on what transfer_sets found: prints their accuracy, and of a
    plug-in the difference that tuning made."""
    train, test, classes = sets
    rows = []
    for column in columns:
        if column.kind == "original":
            continue  # stands beside its plug-ins
        known, labels = features_of(train, column, args)
        unseen, truth = features_of(test, column, args)
        before = None
        for place in known:
            answers = probe_answers(known[place], labels, unseen[place], len(classes))
            right = (answers == truth).float().cpu().numpy()
            row = [f"{column.name}, {place}", right.mean(), "-"]
            if before is not None:
                row[2] = with_error(right - before)
            elif place == "original":
                before = right
            rows.append(row)
    show(args, [f"linear probe, {name}", "accuracy", "minus original"], rows)

# --- Cost -----------------------------------------------------------------------------------------

def flops_of_convolution_backward(grad, x, weight, *settings, out_shape):
    """Of each gradient that is wanted, as many as the forward pass has; torch's counter takes a
    grouped convolution for a dense one."""
    wants_x, wants_weight, _ = settings[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (wants_x + wants_weight)

def count_macs(task):
    """Multiply-accumulates of task(), in 1e9; fused attention would hide from the counter."""
    formulas = {torch.ops.aten.convolution_backward: flops_of_convolution_backward}
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with sdpa_kernel(SDPBackend.MATH), counter:
        task()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() / 2e9

def milliseconds(tasks, device):
    """{name: ms} of {name: function}: medians of five rounds in which all take turns, so that a
    slow moment of the machine strikes all alike."""
    seconds = {name: [] for name in tasks}
    for _ in range(6):  # the first warms up
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times[1:]) for name, times in seconds.items()}

def forward_pass(network, pixels, whole):
    """Inference of the network that was tuned; `whole`: its last block computes all tokens, as the
    library's does, and not the class token alone."""
    blocks = [module for module in network.modules() if isinstance(module, ClassTokenBlock)]
    for block in blocks:
        block.whole = whole
    with torch.no_grad(), autocast(pixels.device):
        network(pixels)
    for block in blocks:
        block.whole = False

def inference(student, pixels, passes):
    """Inference of the student with K = passes."""
    masks = student.masks
    student.masks = masks.new_ones(passes, masks.shape[1])
    with autocast(pixels.device):
        student.eval().predict(pixels)
    student.masks = masks

def training_step(student, teacher, pixels):
    """Loss and gradients, every second image augmented."""
    labels = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
    is_clean = torch.arange(len(pixels), device=pixels.device) % 2 == 0
    with autocast(pixels.device):
        loss = student_loss(student.train(), teacher, pixels, labels, is_clean)
    loss.backward()
    student.zero_grad()

def cost(path, config, args):
    """Print what an image costs: inference under one head (apt) and under three, and a training
    step of each recipe, for the student of a plug-in; beside the network that it was made from, by
    the library's own forward pass, and with its last block computed for the class token alone."""
    network = load_original(path).to(args.device)
    teacher = None
    if config.teacher:
        teacher = load_network(beside(path, config.teacher)).to(args.device)
    n = 64 if args.device == "cuda" else 4
    pixels = torch.rand(n, 3, network.size, network.size, device=args.device)
    tasks = {"library's forward pass": functools.partial(forward_pass, network, pixels, True)}
    ratios = {"/ library": "library's forward pass"}
    if any(isinstance(module, ClassTokenBlock) for module in network.modules()):
        tasks["the same, class token"] = functools.partial(forward_pass, network, pixels, False)
        ratios["/ class token"] = "the same, class token"
    K = config.passes
    apt = assemble(network, replace(config, recipe="apt")).to(args.device)
    tasks[f"apt, K = {K}"] = functools.partial(inference, apt, pixels, K)
    three_heads = assemble(network, replace(config, recipe="three-heads")).to(args.device)
    for passes in (1, K):
        name = f"three-heads, K = {passes}"
        tasks[name] = functools.partial(inference, three_heads, pixels, passes)
    if teacher is not None:
        tasks["teacher"] = functools.partial(forward_pass, teacher, pixels, False)
    for recipe, row in RECIPES.items():
        if "robust" in (row.clean_teacher, row.augmented_teacher) and teacher is None:
            continue
        if config.zero_shot and row.cut == "features":
            continue  # nothing to tune
        student = assemble(network, replace(config, recipe=recipe)).to(args.device)
        name = f"train {recipe}, {count_parameters(student.shared, student.heads) / 1e6:.2f} M"
        tasks[name] = functools.partial(training_step, student, teacher, pixels)
    ms = milliseconds(tasks, args.device)
    gmacs = {name: count_macs(task) for name, task in tasks.items()}
    rows = []
    for name in tasks:
        row = [name]
        for measured in (gmacs, ms):
            row.append(f"{measured[name] / n:.4g}")
            row += [f"{measured[name] / measured[base]:.3f}" for base in ratios.values()]
        rows.append(row)
    title = f"{Path(config.student).name}, {count_parameters(network) / 1e6:.2f} M, an image"
    show(args, [title, "GMACs", *ratios, "ms", *ratios], rows)

# --- The corruptions of ImageNet-C [11] as a library ----------------------------------------------
# A corruption is a function of images x (B, 3, n, n) in [0, 1], one torch.Generator an image, and
# the parameters of one severity. Lengths are in pixels, grey levels in units of the whole range.

PARAMETERS = {  # parameter -> its values at severity 1 to 5 for 224, for 64 and for 32 px
    "gaussian_noise": {
        "sigma": ((.08, .12, .18, .26, .38), (.04, .08, .12, .15, .18), (.04, .06, .08, .09, .1))},
    "shot_noise": {
        "photons": ((60, 25, 12, 5, 3), (250, 100, 50, 30, 15), (500, 250, 100, 75, 50))},
    "impulse_noise": {
        "amount": ((.03, .06, .09, .17, .27), (.01, .02, .05, .08, .14),
                   (.01, .02, .03, .05, .07))},
    "defocus_blur": {
        "radius": ((3, 4, 6, 8, 10), (.5, 1, 1.5, 2.5, 3), (.3, .4, .5, 1, 1.5)),
        "alias": ((.1, .5, .5, .5, .5), (.6, .1, .1, .01, .1), (.4, .5, .6, .2, .1))},
    "glass_blur": {
        "sigma": ((.7, .9, 1, 1.1, 1.5), (.1, .5, .6, .7, .9), (.05, .25, .4, .25, .4)),
        "shift": ((1, 2, 2, 3, 4), (1, 1, 1, 2, 2), (1, 1, 1, 1, 1)),
        "rounds": ((2, 1, 3, 2, 2), (1, 1, 2, 1, 2), (1, 1, 1, 2, 2))},
    "motion_blur": {
        "radius": ((10, 15, 15, 15, 20), (10, 10, 10, 10, 12), (6, 6, 6, 8, 9)),
        "sigma": ((3, 5, 8, 12, 15), (1, 1.5, 2, 2.5, 3), (1, 1.5, 2, 2, 2.5))},
    "zoom_blur": {
        "stop": ((1.11, 1.16, 1.21, 1.26, 1.31), (1.06, 1.11, 1.16, 1.21, 1.26),
                 (1.06, 1.11, 1.16, 1.21, 1.26)),
        "step": ((.01, .01, .02, .02, .03), (.01, .01, .01, .01, .01), (.01, .01, .01, .01, .01))},
    "snow": {
        "mean": ((.1, .2, .55, .55, .55), (.1, .1, .15, .25, .3), (.1, .1, .15, .25, .3)),
        "std": ((.3, .3, .3, .3, .3), (.2, .2, .3, .3, .3), (.2, .2, .3, .3, .3)),
        "zoom": ((3, 2, 4, 4.5, 2.5), (1, 1, 1.75, 2.25, 1.25), (1, 1, 1.75, 2.25, 1.25)),
        "threshold": ((.5, .5, .9, .85, .85), (.6, .5, .55, .6, .65), (.6, .5, .55, .6, .65)),
        "radius": ((10, 12, 12, 12, 12), (8, 10, 10, 12, 14), (8, 10, 10, 12, 14)),
        "sigma": ((4, 4, 8, 8, 12), (3, 4, 4, 6, 12), (3, 4, 4, 6, 12)),
        "mix": ((.8, .7, .7, .65, .55), (.8, .8, .7, .65, .6), (.95, .9, .9, .85, .8))},
    "frost": {
        "image_weight": ((1, .8, .7, .65, .6), (1, .9, .8, .75, .7), (1, 1, .9, .85, .75)),
        "texture_weight": ((.4, .6, .7, .7, .75), (.3, .4, .45, .5, .55), (.2, .3, .4, .4, .45))},
    "fog": {
        "amount": ((1.5, 2, 2.5, 2.5, 3), (.4, .7, 1, 1.5, 2), (.2, .5, .75, 1, 1.5)),
        "decay": ((2, 2, 1.7, 1.5, 1.4), (3, 3, 2.5, 2, 1.75), (3, 3, 2.5, 2, 1.75))},
    "brightness": {"amount": ((.1, .2, .3, .4, .5), (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3))},
    "contrast": {"factor": ((.4, .3, .2, .1, .05), (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15))},
    "elastic_transform": {
        "alpha": ((488, 488, 12.2, 17.08, 29.28), (0, 3.2, 6.4, 6.4, 10.24),
                  (0, 1.6, 2.56, 3.2, 3.2)),
        "sigma": ((170.8, 19.52, 2.44, 2.44, 2.44), (0, 19.2, 5.12, 1.92, 1.92),
                  (0, 6.4, 1.92, 1.28, .96)),
        "affine": ((24.4, 48.8, 4.88, 4.88, 4.88), (5.12, 3.84, 3.84, 1.92, 1.28),
                   (2.56, 2.24, 1.92, 1.6, .96))},
    "pixelate": {"scale": ((.6, .5, .4, .3, .25), (.9, .8, .7, .6, .5), (.95, .9, .85, .75, .65))},
    "jpeg_compression": {
        "quality": ((25, 18, 15, 10, 7), (65, 58, 50, 40, 25), (80, 65, 58, 50, 40))},
    "speckle_noise": {
        "sigma": ((.15, .2, .35, .45, .6), (.15, .2, .25, .3, .35), (.06, .1, .12, .16, .2))},
    "gaussian_blur": {"sigma": ((1, 2, 3, 4, 6), (.5, .75, 1, 1.25, 1.5), (.4, .6, .7, .8, 1))},
    "saturate": {
        "factor": ((.3, .1, 2, 5, 20), (.3, .1, 2, 5, 30), (.3, .1, 1.5, 2, 2.5)),
        "shift": ((0, 0, 0, .1, .2), (0, 0, 0, .1, .2), (0, 0, 0, .1, .2))}}
VALIDATION = ("speckle_noise", "gaussian_blur", "saturate")  # for tuning: in no mean of the fifteen
FIFTEEN = tuple(name for name in PARAMETERS if name not in VALIDATION)
CHUNK = 8  # images corrupted at a time, so that a large batch needs no more memory

def levels(x):
    """The grey levels 0 to 255 of x: cut, not rounded, as published."""
    return (x.clamp(0, 1) * 255 + 1e-4).floor()  # float32 may leave a whole number a little short

def normal(generators, shape):
    """Standard normal numbers (B, ...), `shape` of them from each generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])

def uniform(generators, shape, low, high):
    """Numbers (B, ...) uniform in [low, high), `shape` of them from each generator."""
    return torch.stack([torch.empty(shape).uniform_(low, high, generator=g) for g in generators])

def gaussian_noise(x, generators, sigma):
    """Add normal noise of standard deviation sigma."""
    return x + sigma * normal(generators, x.shape[1:]).to(x)

def shot_noise(x, generators, photons):
    """Count photons, of which a white pixel receives `photons` on average."""
    expected = (x * photons).cpu()
    counts = [torch.poisson(image, generator) for image, generator in zip(expected, generators)]
    return torch.stack(counts).to(x) / photons

def impulse_noise(x, generators, amount):
    """Turn the share `amount` of all values into salt (1) or pepper (0)."""
    chance = uniform(generators, x.shape[1:], 0, 1).to(x)
    salted = torch.where(chance < amount, 1, x)
    return torch.where(chance < amount / 2, 0, salted)

def speckle_noise(x, generators, sigma):
    """Add normal noise of standard deviation sigma times the value."""
    return x + x * sigma * normal(generators, x.shape[1:]).to(x)

def gaussian_weights(offsets, sigma):
    """A Gaussian at integer offsets from its peak, with sum 1."""
    return torch.softmax(-offsets**2 / (2 * sigma**2), 0)

def padded_indices(n, width, mode):
    """The pixels that a line of n shows when it goes on for `width` px at both ends."""
    return torch.from_numpy(np.pad(np.arange(n), width, mode))  # F.pad refuses a width over n

def defocus_blur(x, generators, radius, alias):
    """Blur by a disk of `radius` px, its rim smoothed by a Gaussian of `alias` px."""
    width = max(8, radius)
    line = torch.arange(-width, width + 1.0)
    disk = (line[:, None]**2 + line**2 <= radius**2).float()
    disk = disk / disk.sum()

    reach = 1
    if radius > 8:
        reach = 2
    weights = gaussian_weights(torch.arange(-reach, reach + 1), alias)
    disk = F.pad(disk[None, None], (reach,) * 4, mode="reflect")
    kernel = F.conv2d(disk, torch.outer(weights, weights)[None, None]).to(x)

    indices = padded_indices(x.shape[-1], width, "reflect").to(x.device)
    x = x[:, :, indices][:, :, :, indices]
    return F.conv2d(x, kernel.expand(3, 1, -1, -1), groups=3)

def gaussian(x, sigma, truncate=4, mode="edge"):
    """Blur by a Gaussian of sigma px, cut at truncate * sigma; `mode` names np.pad's borders."""
    n = x.shape[-1]
    radius = int(truncate * sigma + 0.5)
    weights = gaussian_weights(torch.arange(-radius, radius + 1), sigma)
    # Row i of the matrix holds the weight of each pixel in pixel i of the result: two small
    # products are faster than a convolution, and borders wider than the image need no care.
    read = padded_indices(n, radius, mode).unfold(0, 2 * radius + 1, 1)
    matrix = torch.zeros(n, n).scatter_add_(1, read, weights.expand(n, -1)).to(x)
    return matrix @ x @ matrix.T

def gaussian_blur(x, generators, sigma):
    """Blur by a Gaussian of sigma px."""
    return gaussian(x, sigma)

def glass_blur(x, generators, sigma, shift, rounds):
    """Blur by sigma px, let pixels copy others up to `shift` px away for `rounds`, blur again."""
    n = x.shape[-1]
    x = levels(gaussian(x, sigma)) / 255
    pixel = torch.arange(n * n, device=x.device).expand(len(x), -1)
    nearest = torch.minimum(pixel // n, pixel % n)
    farthest = torch.maximum(pixel // n, pixel % n)
    inner = (nearest > shift) & (farthest <= n - shift)
    for _ in range(rounds):
        moves = [torch.randint(-shift, shift, (2, n * n), generator=g) for g in generators]
        down, right = torch.stack(moves).to(x.device).unbind(1)
        target = torch.where(inner, pixel + n * down + right, pixel)

        # As published, a round runs from the last pixel to the first and changes the image in
        # place: a target further on is a copy already. Such pixels form chains, and looking up
        # where each lookup leads follows them twice as far every time.
        copied = inner.gather(1, target) & (target > pixel)
        end = torch.where(copied, target, pixel)
        further = end.gather(1, end)
        while not torch.equal(end, further):
            end = further
            further = end.gather(1, end)
        source = target.gather(1, end)
        x = x.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view_as(x)
    return gaussian(x, sigma)

def motion_blur(x, generators, radius, sigma, low=-45, high=45):
    """Smear by half a Gaussian of sigma px, 2 * radius + 1 long, at `low` to `high` degrees."""
    n = x.shape[-1]
    taps = 2 * radius + 1
    weights = gaussian_weights(torch.arange(taps), sigma).tolist()
    angles = uniform(generators, (), low, high).deg2rad().tolist()
    padded = F.pad(x, (taps,) * 4, mode="replicate")
    smeared = torch.zeros_like(x)
    for image, angle in enumerate(angles):
        for tap, weight in enumerate(weights):
            # ImageMagick reads whole pixels along the line, halves rounded down.
            top = taps + math.ceil(tap * math.sin(angle) - 0.5)
            left = taps + math.ceil(tap * math.cos(angle) - 0.5)
            seen = padded[image, :, top:top + n, left:left + n]
            smeared[image].add_(seen, alpha=weight)
    return levels(smeared) / 255  # ImageMagick returns 8 bits: snow is lighter without this

def zoomed(x, factor):
    """The centre of x, magnified by `factor` to the size of x (scipy's zoom of order 1, cut)."""
    n = x.shape[-1]
    crop = math.ceil(n / factor)
    top = (n - crop) // 2
    size = round(crop * factor)
    x = x[..., top:top + crop, top:top + crop]
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)
    trim = (size - n) // 2
    return x[..., trim:trim + n, trim:trim + n]

def zoom_blur(x, generators, stop, step):
    """Average x with its centre magnified by 1, 1 + step, ... up to `stop`."""
    factors = np.arange(1, stop, step)  # its float rounding decides on the last, as published
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor)
    return total / (len(factors) + 1)

def snow(x, generators, mean, std, zoom, threshold, radius, sigma, mix):
    """Whiten the image and let flakes fall: noise over `threshold`, magnified and smeared."""
    n = x.shape[-1]
    noise = normal(generators, (1, n, n)).to(x)
    flakes = zoomed(mean + std * noise, zoom)
    flakes = levels(torch.where(flakes < threshold, 0, flakes)) / 255
    flakes = motion_blur(flakes, generators, radius, sigma, low=-135, high=-45)
    grey = v2.functional.rgb_to_grayscale(x)
    x = mix * x + (1 - mix) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.rot90(2, (2, 3))

def check_frost(folder):
    """The files frost1 to frost5 of the folder with ImageNet-C's photos, or a Refusal."""
    files = []
    for number in range(1, 6):  # as published the sixth photo is never drawn
        found = sorted(Path(folder).glob(f"frost{number}.*"))
        if not found:
            raise Refusal(f"--frost {folder}: has no frost{number}.*; the photos frost1 to frost5 "
                          "come with ImageNet-C's code")
        files.append(found[0])
    return files

@functools.cache
def frost_photos(folder, n):
    """The five photos (3, H, W) in [0, 1], at the scale that suits images of n px."""
    photos = []
    for file in check_frost(folder):
        photo = v2.functional.pil_to_tensor(Image.open(file).convert("RGB")) / 255
        height, width = photo.shape[1:]
        scale = float(np.interp(n, (32, 64, 224), (0.2, 0.3, 1)))
        scale = max(scale, n / min(height, width))  # a photo has to cover the image
        size = (round(height * scale), round(width * scale))
        photos.append(F.interpolate(photo[None], size=size, mode="bilinear")[0])
    return photos

def frost(x, generators, image_weight, texture_weight, folder):
    """Mix the image with a random piece of one of the photos in `folder`, each by its weight."""
    n = x.shape[-1]
    photos = frost_photos(folder, n)
    pieces = []
    for generator in generators:
        photo = photos[torch.randint(5, (), generator=generator)]
        height, width = photo.shape[1:]
        top = torch.randint(max(height - n, 1), (), generator=generator)
        left = torch.randint(max(width - n, 1), (), generator=generator)
        pieces.append(photo[:, top:top + n, left:left + n])
    return image_weight * x + texture_weight * torch.stack(pieces).to(x)

def jittered(total, amplitude, generators):
    """The mean of four neighbours, given their sum, and a random step."""
    step = uniform(generators, total.shape[1:], -amplitude, amplitude)
    return total / 4 + amplitude * step  # the amplitude enters twice, as published

def plasma(generators, n, decay):
    """Clouds (B, n, n) in [0, 1]: a diamond-square fractal, rougher with less `decay`."""
    size = 2
    while size < n:
        size *= 2
    cloud = torch.zeros(len(generators), size, size)
    step = size
    amplitude = 100.0
    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = jittered(pairs + pairs.roll(-1, 2), amplitude, generators)
        above = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        beside = centres + centres.roll(1, 2) + pairs
        cloud[:, half::step, half::step] = centres
        cloud[:, ::step, half::step] = jittered(above, amplitude, generators)
        cloud[:, half::step, ::step] = jittered(beside, amplitude, generators)
        step = half
        amplitude = amplitude / decay
    cloud = cloud - cloud.amin((1, 2), keepdim=True)
    cloud = cloud / cloud.amax((1, 2), keepdim=True)
    return cloud[:, :n, :n]

def fog(x, generators, amount, decay):
    """Add `amount` times a cloud, then darken until no value is above the largest of before."""
    peak = x.amax((1, 2, 3), keepdim=True)
    cloud = plasma(generators, x.shape[-1], decay)[:, None].to(x)
    return (x + amount * cloud) * peak / (peak + amount)

def brightness(x, generators, amount):
    """Raise the HSV value, the largest channel, by `amount`; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    colour = torch.where(value > 0, x / value.clamp_min(1e-8), 1)
    return colour * (value + amount).clamp_max(1)

def saturate(x, generators, factor, shift):
    """Set HSV saturation s to s * factor + shift; hue and value stay."""
    value = x.amax(1, keepdim=True)
    saturation = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-8)
    # How far each channel lies below the value at full saturation. Grey has hue 0, red.
    below_red = torch.tensor([0.0, 1.0, 1.0]).to(x)[:, None, None] * value
    below = (value - x) / saturation.clamp_min(1e-8)
    below = torch.where(saturation < 1e-8, below_red, below)
    return value - below * (saturation * factor + shift).clamp(0, 1)

def contrast(x, generators, factor):
    """Scale the distance from the mean of each channel by `factor`."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean

def elastic_transform(x, generators, alpha, sigma, affine):
    """Move three points by up to `affine` px and the rest along, then each pixel on its own by
    alpha times uniform noise that is smoothed over sigma px."""
    n = x.shape[-1]
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    points = (signs * (n // 3) + n // 2).to(x)
    moved = points + uniform(generators, (3, 2), -affine, affine).to(x)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1), points.expand_as(moved))
    line = torch.arange(n, device=x.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).to(x)
    source = F.pad(grid, (0, 1), value=1) @ back[:, None]
    # Borders mirror about the centre of the last pixel here, and about its outer edge below.
    source = 2 * source / max(n - 1, 1) - 1
    x = F.grid_sample(x, source, padding_mode="reflection", align_corners=True)
    if alpha == 0:
        return x
    noise = uniform(generators, (2, n, n), -1, 1).to(x)
    noise = gaussian(noise, sigma, truncate=3, mode="symmetric")
    source = grid + alpha * noise.permute(0, 2, 3, 1)
    source = (2 * source + 1) / n - 1
    return F.grid_sample(x, source, padding_mode="reflection", align_corners=False)

def pixelate(x, generators, scale):
    """Shrink to `scale` times the size and enlarge again, by Pillow's box filter."""
    n = x.shape[-1]
    few = max(int(n * scale), 1)
    coarse = []
    for pixels in (x * 255).round().byte().cpu():
        image = v2.functional.to_pil_image(pixels)
        image = image.resize((few, few), Image.BOX).resize((n, n), Image.BOX)
        coarse.append(v2.functional.pil_to_tensor(image))
    return torch.stack(coarse).to(x) / 255

def jpeg(images, quality):
    """Encode images (uint8) as JPEG of this quality and decode them again."""
    decoded = []
    for image in images.cpu():
        file = io.BytesIO()
        v2.functional.to_pil_image(image).save(file, "JPEG", quality=quality)
        decoded.append(v2.functional.pil_to_tensor(Image.open(file)))
    return torch.stack(decoded).to(images.device)

def jpeg_compression(x, generators, quality):
    """Encode as JPEG of this quality and decode again."""
    return jpeg((x * 255).round().byte(), quality) / 255

CORRUPTIONS = {
    "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur, "glass_blur": glass_blur, "motion_blur": motion_blur,
    "zoom_blur": zoom_blur, "snow": snow, "frost": frost, "fog": fog, "brightness": brightness,
    "contrast": contrast, "elastic_transform": elastic_transform, "pixelate": pixelate,
    "jpeg_compression": jpeg_compression, "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur, "saturate": saturate}

def corrupt(images, name, severity, indices, seed=0, frost=None):
    """Corrupt images (B, 3, n, n) of uint8 by name, at severity 1 to 5; `frost` is the folder of
    photos. Each image has a generator of (seed, its index, name, severity): its batch is no matter.
    """
    height, width = images.shape[2:]
    if height != width:
        raise Refusal(f"corruptions take square images, not {width} x {height} px")
    nearest = 0  # the parameters for 224, 64 or 32 px
    if width < 48:
        nearest = 2
    elif width < 144:
        nearest = 1
    values = {key: rows[nearest][severity - 1] for key, rows in PARAMETERS[name].items()}
    if name == "frost":
        values["folder"] = frost
    number = list(CORRUPTIONS).index(name)
    generators = []
    for index in indices:
        key = np.random.SeedSequence((seed, int(index), number, severity)).generate_state(1)[0]
        generators.append(torch.Generator().manual_seed(int(key)))

    corrupted = torch.empty_like(images)
    for start in range(0, len(images), CHUNK):
        chunk = slice(start, start + CHUNK)
        x = CORRUPTIONS[name](images[chunk].float() / 255, generators[chunk], **values)
        corrupted[chunk] = levels(x).byte()
    return corrupted

# --- main -----------------------------------------------------------------------------------------

DEMO = ("speckle_noise", "gaussian_blur", "saturate", "impulse_noise", "defocus_blur",
        "jpeg_compression")

def parse(arguments):
    """The settings; raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="folders of test images")
    add("--model", nargs="+", default=["robust.pt"], help="plug-ins, networks, or names of these")
    add("--pretrained", default="", help="for names, as in robustify.py")
    add("--templates", help="of class names: openai, simple, or text with {}; default: openai, or "
        "what a plug-in was tuned with")
    add("--alpha", nargs="+", type=float, help="a column for each interpolation with the original "
        "(WiSE-FT): 0 is the original but for MC dropout, 1 the plug-in")
    add("--rule", nargs="+", choices=("kl-u", "u", "kl", "confidence"), help="a column for each")
    add("--passes", nargs="+", type=int, help="a column for each K")
    add("--average", action="store_true", help="a column for the mean of all models' "
        "probabilities of the folder's classes")
    add("--corrupt", nargs="*", metavar="NAME", choices=CORRUPTIONS, help="corrupt the images "
        "too: the fifteen, or those named; for tuning " + ", ".join(VALIDATION))
    add("--severity", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5],
        metavar="1..5")
    add("--frost", help="folder of ImageNet-C's frost photos; without it fourteen corruptions")
    add("--jpeg", action="store_true", help="after corrupting, JPEG of quality 85 as published")
    add("--transfer", nargs="+", default=[], help="folders with train/ and val/ or test/, "
        "for linear probes")
    add("--cost", action="store_true", help="GMACs and milliseconds of inference, and of training "
        "by every recipe")
    add("--plot", help="picture of accuracy against severity (needs matplotlib)")
    add("--json", help="write everything that was measured to this file")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=Config().workers)
    add("--seed", type=int, default=0, help="of corruptions made here")
    add("--device", choices=("cuda", "cpu"), default=Config().device)
    args = parser.parse_args(arguments)
    if not arguments:
        args.data = ["demo/val"]
        args.model = ["demo/teacher.pt", "demo/apt.pt", "demo/three-heads.pt"]
        args.corrupt = list(DEMO)
        args.severity = [3, 5]
        if not Path(args.model[-1]).is_file():
            raise Refusal(f"{args.model[-1]}: no such file; make it with: python robustify.py")
    if args.corrupt == []:
        args.corrupt = [name for name in FIFTEEN if args.frost or name != "frost"]
    args.corrupt = list(dict.fromkeys(args.corrupt or []))
    args.tables = []
    return args

def check(args):
    """Raises Refusal where the settings cannot be."""
    if not (args.data or args.transfer or args.cost):
        raise Refusal("give --data, --transfer or --cost, or no argument for the demo's results")
    if args.batch_size < 1 or min(args.workers, args.seed) < 0:
        raise Refusal("--batch-size: from 1; --workers and --seed: from 0")
    if min(args.passes or [2]) < 2 or not all(0 <= alpha <= 1 for alpha in args.alpha or []):
        raise Refusal("--passes: from 2; --alpha: from 0 to 1")
    if args.templates and args.templates not in TEMPLATES and args.templates.count("{}") != 1:
        raise Refusal("--templates: openai, simple, or a string with {} for the class name")
    if (args.frost or args.jpeg) and not args.corrupt:
        raise Refusal("--frost, --jpeg: only with --corrupt")
    if "frost" in args.corrupt and not args.frost:
        raise Refusal("--corrupt frost: needs --frost, the folder of its photos")
    if args.frost:
        check_frost(args.frost)
    for file in filter(None, (args.json, args.plot)):
        if not can_be_written(file):
            raise Refusal(f"{file}: not a file in a folder that can be written")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise Refusal("--plot: a file that ends in .png, .pdf or .svg")

def run(arguments):
    """Parse, measure, print. Raises Refusal; what can be refused is, before an image is read."""
    args = parse(arguments)
    check(args)
    join_processes(args.device)
    folders = []
    for path, name in zip(args.data, short_names("--data", args.data)):
        folders.append(read_folder(path, name, args))
    folders.sort(key=lambda folder: not folder.held_out)  # relative mCE needs the clean set
    if args.plot and not any(folder.averaged for folder in folders):
        raise Refusal("--plot: needs corrupted images; see --corrupt")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise Refusal("--plot: needs matplotlib; pip install matplotlib")
    transfers = {}
    for path, name in zip(args.transfer, short_names("--transfer", args.transfer)):
        transfers[name] = transfer_sets(path)
    columns = load_columns(args)
    for folder, column in itertools.product(folders, columns):
        class_outputs(folder, column)
    if args.cost and not any(column.path for column in columns):
        raise Refusal("--cost: needs a plug-in of robustify.py among --model")
    with redirect_stdout(None if RANK else sys.stdout):  # one process prints
        evaluate(folders, transfers, columns, args)
        if not arguments:
            print("\nWhat to see: how far APT and three heads stand above the original under "
                  "corruption,\nand how much more often Eq. 6 chooses the clean head on val.")

def evaluate(folders, transfers, columns, args):
    """Measure and print what the command line asks for. Whatever ends it early, what was finished
    is printed and written, marked as partial."""
    partial = True
    try:
        costed = {column.path: column.model.config for column in columns if column.path}
        if args.cost:
            for path, config in costed.items():
                cost(path, config, args)
        for folder in folders:
            measure_and_report(folder, folders, columns, args)
        for name, sets in transfers.items():
            transfer(name, sets, columns, args)
        partial = False
    finally:
        if partial and args.tables:
            print("\nnot finished: the tables and --json hold what was")
        average_of_shifts(folders, columns, args)
        if args.json and args.tables and not RANK:
            write_json(folders, columns, args, partial)
        if args.plot and not RANK and any(folder.results for folder in folders):
            plot(folders, columns, args)

def measure_and_report(folder, folders, columns, args):
    """Print what a folder is, and its tables, also where measuring it ends early."""
    made = any(test_set.made for test_set in folder.sets)
    print(f"\n{folder.name}: {len(folder.sets[0].samples)} images, {len(folder.classes)} classes")
    if all(name.isdecimal() for name in folder.classes):
        print("numbers as classes: outputs of an ImageNet network, unless a model has such names")
    if made:
        print("corruptions made here" + ", then JPEG of quality 85" * args.jpeg)
    if made and set(folder.averaged) == set(FIFTEEN) - {"frost"}:
        print("no frost photos (--frost): fourteen corruptions, no mCE")
    for column in columns:
        if names_none(column, folder):
            print(f"{column.name} names no classes: taken in the order of the folders")
    if folder.missing:
        print("missing:", ", ".join(f"{name} {severity}" for name, severity in folder.missing))
    try:
        for result in measure(folder, columns, args):
            folder.results.append(result)
    finally:
        if folder.results:
            report(folder, folders, columns, args)

def main(arguments=None):
    """The command line; returns the exit code."""
    return robustify.main(arguments, run)

if __name__ == "__main__":
    sys.exit(main())

"""Train two libraries' networks and ours for the same time, and score what they draw.

    python benchmarks/libraries.py train    is the command; this file is imported only

A pair is ddim.py and a library, trained at once, each on one core, for the same minutes and without
every sixth image.  Each then draws with its own sampler, networks in float32, and the functions of
evaluate.py score both beside the test images: what counts is the ratio within a pair.

ddim.py has its defaults, those of when the pair was scored.  A library has what ddim.py has, where
it offers it: classes with a tenth of the labels dropped, cosine schedule, v, clipped gradients,
bfloat16 in training where the CPU computes in it, the same annealing of the rate, an EMA, which is
its own; and RECIPES.  The guidance of each library is chosen after its training, by F-FID on the
images left out, among none, a middle one and its default.  That of ddim.py is not.  Runs stay in
runs/libraries, and count as done: after a change of this file or of ddim.py, delete them and
results/libraries.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import evaluate
import infer_onnx
from benchmarks import SCORES, libraries, only_table, pinned, report
from benchmarks.libraries import LIBRARIES, OURS, ROOT, build
from infer_onnx import InputError, written_whole

RUNS = ROOT / "runs/libraries"
# From diffusers' train_unconditional.py and DiTPipeline, and the other's Trainer and Unet, but for
# what suits a short run: the learning rate of the tutorials on MNIST (the course on diffusion
# models of Hugging Face) and Fashion-MNIST ("The Annotated Diffusion Model"), fewer steps of
# warm-up, and an EMA that follows each step, not each tenth.  The last guidance is the default;
# 1.0001 is none, since the sampler fails at 1.
WARMUP = 100  # steps
RECIPES = {
    "diffusers": {
        "width": 32, "batch_size": 64, "lr": 1e-3, "steps": 15, "guidance": [1.0, 1.5, 4.0],
        "adamw": {"betas": [0.95, 0.999], "weight_decay": 1e-6},
        "ema": {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75},
        "sampler": {"thresholding": True, "lambda_min_clipped": -5.1},
    },
    "denoising-diffusion-pytorch": {
        "width": 32, "batch_size": 64, "lr": 1e-3, "steps": 20, "guidance": [1.0001, 1.5, 6.0],
        "adamw": {"betas": [0.9, 0.99], "weight_decay": 0.0},
        "ema": {"beta": 0.995, "update_every": 1},
        "sampler": {"ddim_sampling_eta": 0.0},
    },
}  # fmt: skip
CHANGED = ("width", "batch_size", "lr", "steps")  # of a recipe, by flags
LEAST = {
    "minutes": 0.05, "num_samples": 100, "width": 8, "batch_size": 1, "lr": 1e-6, "steps": 2,
}  # fmt: skip
TRIED = 500  # samples by which guidance is chosen, of another seed than those that are scored
BLOCK = 500  # at most so many images are drawn by one process

# --- The libraries --------------------------------------------------------------------------------


class Diffusers:
    """UNet2DModel with the schedulers and the EMA of diffusers."""

    def __init__(self, recipe):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.recipe = recipe
        self.predict, self.network = build("diffusers", recipe["width"])
        noising = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
        self.noising = DDPMScheduler(**noising)
        self.ema = EMAModel(self.network.parameters(), **recipe["ema"])

    def loss(self, x_0, y, precision):
        import torch

        t = torch.randint(0, len(self.noising.betas), y.shape)
        eps = torch.randn_like(x_0)
        y = torch.where(torch.rand(y.shape) < 0.1, 10, y)  # 10: no class
        with precision:
            v = self.predict(self.noising.add_noise(x_0, eps, t), t, y)
        return (v.float() - self.noising.get_velocity(x_0, eps, t)).square().mean()

    def average(self):
        self.ema.step(self.network.parameters())

    def averaged(self):
        self.ema.copy_to(self.network.parameters())
        return self.network.state_dict()

    def draw(self, y, guidance):
        """Images in about [-1, 1] by DPM-Solver++, guided as in diffusers' DiTPipeline."""
        import torch
        from diffusers import DPMSolverMultistepScheduler

        # Thresholding limits x_0_hat to [-1, 1], since sample_max_value is 1.
        config = self.noising.config
        solver = DPMSolverMultistepScheduler.from_config(config, **self.recipe["sampler"])
        solver.set_timesteps(self.recipe["steps"])
        x_t = torch.randn(len(y), 1, 32, 32)
        for t in solver.timesteps:
            v = self.predict(x_t, t, y)
            if guidance != 1:
                null = self.predict(x_t, t, torch.full_like(y, 10))
                v = null + guidance * (v - null)
            x_t = solver.step(v, t, x_t).prev_sample
        return x_t


class DenoisingDiffusion:
    """Unet and GaussianDiffusion of classifier_free_guidance.py, and the EMA of ema_pytorch."""

    def __init__(self, recipe):
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion
        from ema_pytorch import EMA

        unet = build("denoising-diffusion-pytorch", recipe["width"])[1]
        how = {"objective": "pred_v", "sampling_timesteps": recipe["steps"], **recipe["sampler"]}
        self.network = GaussianDiffusion(unet, image_size=32, **how)
        self.network.loss_weight.fill_(1.0)  # else alpha_bar_t: no loss at the times of noise
        self.ema = EMA(self.network, **recipe["ema"])

    def loss(self, x_0, y, precision):
        with precision:
            return self.network((x_0 + 1) / 2, classes=y)

    def average(self):
        self.ema.update()

    def averaged(self):
        return self.ema.ema_model.state_dict()

    def draw(self, y, guidance):
        """Images in [-1, 1] by its DDIM, of two evaluations a step with any guidance."""
        return self.network.sample(y, cond_scale=guidance) * 2 - 1


PEERS = dict(zip(LIBRARIES, (Diffusers, DenoisingDiffusion), strict=True))

# --- In a process of its own ----------------------------------------------------------------------


def check(job):
    """Fail if the library is missing or cannot take a step and draw, before hours of work."""
    import torch

    peer = PEERS[job["library"]](job["recipe"])
    y = torch.arange(3)
    peer.loss(torch.zeros(3, 1, 32, 32), y, torch.autocast("cpu", enabled=False)).backward()
    peer.average()
    peer.network.load_state_dict(peer.averaged())
    with torch.no_grad():
        peer.draw(y, 2.0)


def train(job):
    """Train a library for job["minutes"]; save the averaged weights, and what it took."""
    import torch

    from common import load_data, to_float, without_held_out
    from runs import autocast, epoch_batches, learning_rate

    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    data = without_held_out(load_data("set:fashion-mnist", job["data_dir"]))
    recipe = argparse.Namespace(warmup=WARMUP, **job["recipe"])
    peer = PEERS[job["library"]](job["recipe"])
    parameters = [*peer.network.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, fused=True, **recipe.adamw)
    precision = autocast(torch.device("cpu"), None)
    n = len(data.images)
    epochs = (epoch_batches(n, recipe.batch_size, 0, epoch) for epoch in itertools.count())
    start = said = time.monotonic()
    for step, batch in enumerate(itertools.chain.from_iterable(epochs)):
        seconds = time.monotonic() - start
        if seconds > 60 * job["minutes"]:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, seconds / 60 / job["minutes"])
        loss = peer.loss(to_float(data.images[batch]), data.labels[batch], precision)
        if not loss.isfinite():
            raise RuntimeError(f"the loss of step {step} is not finite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        peer.average()
        if time.monotonic() > said + 30:
            said = time.monotonic()
            print(f"{seconds / 60:.1f} minutes, step {step}, loss {loss.item():.4f}", flush=True)
    count = sum(p.numel() for p in parameters)
    about = {"parameters": count, "seconds": seconds, "images": step * recipe.batch_size}
    with written_whole(Path(job["folder"], "library.pt")) as scratch:
        torch.save({"ema": peer.averaged(), "about": about}, scratch)


def draw(job):
    """Draw job["count"] images, the classes in turn, into job["file"], with what is known of them.

    job["library"]: None is ddim.py, with its defaults.
    """
    import torch

    from common import to_uint8

    torch.set_flush_denormal(True)
    torch.manual_seed(job["seed"])
    y = torch.tensor(evaluate.balanced_labels(0, job["count"]))
    if job["library"]:
        state = torch.load(Path(job["folder"], "library.pt"), weights_only=True)
        peer = PEERS[job["library"]](job["recipe"])
        peer.network.load_state_dict(state["ema"])
        peer.network.eval()
        with torch.no_grad():
            images = torch.cat([peer.draw(part, job["guidance"]) for part in y.split(100)])
        about = state["about"] | {"guidance": job["guidance"]}
        about["evaluations"] = job["recipe"]["steps"] * (1 + (job["guidance"] != 1))
    else:
        import ddim
        from benchmarks import settings
        from runs import load_checkpoint

        state = load_checkpoint(Path(job["folder"], "ddim/ddim.pt"), ("ddim",))
        model = ddim.ema_network(state, torch.device("cpu"))
        images = ddim.sample(model, y, seed=job["seed"])
        walk = {"steps": ddim.STEPS, "guidance": ddim.GUIDANCE, "pairs": "dpm_pairs"}
        evaluations = settings.evaluations(walk | {"guidance_interval": ddim.GUIDANCE_INTERVAL})
        about = {"parameters": sum(p.numel() for p in model.parameters()), "guidance": None}
        about |= {"evaluations": evaluations, **{key: state[key] for key in ("images", "seconds")}}
    with written_whole(Path(job["file"])) as scratch, scratch.open("wb") as file:
        np.savez(file, images=to_uint8(images).numpy(), about=json.dumps(about))


def work(what, job):
    """Do what a command of job_command asks for."""
    {"check": check, "train": train, "draw": draw}[what](job)


# --- Pairs ----------------------------------------------------------------------------------------


def job_command(what, job):
    return [sys.executable, str(ROOT / "benchmarks/libraries.py"), "--job", json.dumps([what, job])]


def train_commands(run, folder, data_dir):
    """The trainings of ddim.py and of a library: the same minutes, the same images left out."""
    minutes = run["minutes"]
    ours = [sys.executable, str(ROOT / "ddim.py"), "--train", "--hold-out"]
    ours += ["--minutes", str(minutes), "--run-dir", str(folder / "ddim")]
    ours += ["--save-every", "1000"]  # minutes: a library saves once, at its end
    ours += ["--data-dir", data_dir] * (data_dir is not None)
    job = {"library": run["library"], "recipe": run["recipe"], "minutes": minutes}
    return [ours, job_command("train", job | {"folder": str(folder), "data_dir": data_dir})]


def draw_commands(run, folder, library, guidance, count, first_seed):
    """{file: the command that draws it}: blocks of images, each of its own seed.

    library: None is ddim.py.
    """
    job = {"library": library, "recipe": run["recipe"], "guidance": guidance, "folder": str(folder)}
    found = {}
    for seed, first in enumerate(range(0, count, BLOCK), first_seed):
        file = folder / f"{library or 'ddim'}-{guidance}-{seed}-{min(BLOCK, count - first)}.npz"
        block = {"file": str(file), "seed": seed, "count": min(BLOCK, count - first)}
        found[file] = job_command("draw", job | block)
    return found


def load_blocks(files):
    """uint8 images (N, 1, 32, 32) of several files of draw(), and what the first says of them."""
    blocks = [np.load(file) for file in files]
    images = np.concatenate([block["images"] for block in blocks])
    return images, json.loads(str(blocks[0]["about"]))


def run_at_once(commands, cores, log):
    """Run commands, one on each core at a time and each with one thread; one that fails stops all.

    Raises RunError, which names the log.
    """
    waiting, running, count = [*commands], {}, len(commands)
    start = said = time.monotonic()
    try:
        while waiting or running:
            for core in [core for core in cores if core not in running][: len(waiting)]:
                with log.open("a") as out:
                    running[core] = subprocess.Popen(
                        waiting.pop(0), stdout=out, stderr=out, **pinned(core)
                    )
            time.sleep(0.1)
            for core in [core for core, process in running.items() if process.poll() is not None]:
                if code := running.pop(core).returncode:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise infer_onnx.RunError(f"exit code {code}, see {log}: {' '.join(last)}")
            if time.monotonic() > said + 60:
                said = time.monotonic()
                done, minutes = count - len(waiting) - len(running), (said - start) / 60
                print(f"  {minutes:.0f} minutes, {done} of {count} done", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def compare(run, data_dir, cores, judges):
    """Train a pair, draw, and score: the run, with its results.  judges: of make_judges."""
    held_out_ffid, reference = judges
    library, weights = run["library"], run["recipe"]["guidance"]
    folder = RUNS / f"{library}-{hashlib.sha256(key(run).encode()).hexdigest()[:8]}"
    log, trained = folder / "log.txt", folder / "trained"

    def draw_all(sets):
        """Images, and what is known of them, of each of several draw_commands()."""
        missing = [set_[file] for set_ in sets for file in set_ if not file.is_file()]
        run_at_once(missing, cores, log)
        return [load_blocks(set_) for set_ in sets]

    if not trained.is_file():  # both anew, since they share the machine
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{library}: training both, {run['minutes']:g} minutes", flush=True)
        run_at_once(train_commands(run, folder, data_dir), cores[:2], log)
        trained.touch()
    print(f"{library}: choosing its guidance from {weights}", flush=True)
    count = min(TRIED, run["num_samples"])
    sets = [draw_commands(run, folder, library, w, count, 0) for w in weights]
    tried = {w: held_out_ffid(x) for w, (x, _) in zip(weights, draw_all(sets), strict=True)}
    best = min(tried, key=tried.get)
    print(f"{library}: guidance {best:g}; drawing {run['num_samples']:,} of both", flush=True)
    each = ((library, best), (None, None))
    first_seed = 1000  # beyond those of the choice
    sets = [draw_commands(run, folder, *who, run["num_samples"], first_seed) for who in each]
    sides = {}
    for name, (images, about) in zip((library, OURS), draw_all(sets), strict=True):
        labels = np.array(evaluate.balanced_labels(0, len(images)))
        scores = evaluate.score_images(reference, images, labels)
        sides[name] = about | {"scores": {score: float(scores[score]) for score in SCORES}}
    packages = (library, "torch", *["ema-pytorch"] * (library != "diffusers"))
    return run | {
        "guidance_tried": [*tried.items()],
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": evaluate.machine(threads=1, provider="CPU"),
        "ratio": {s: sides[library]["scores"][s] / sides[OURS]["scores"][s] for s in SCORES[:2]},
        "sides": {name: sides[name] for name in (OURS, library)},
    }


def make_judges(data_dir):
    """F-FID beside the images left out, a function, and the Reference of the test images."""
    data = evaluate.load_real("set:fashion-mnist", data_dir)
    test, left_out = data.parts()[1][0], data.parts(hold_out=True)[1][0]
    files = [ROOT / f"pretrained/extractor{i}.onnx" for i in ("", "2")]
    sessions = [evaluate.load_extractor(file, data.name, data.parts()[1], 1)[0] for file in files]
    reference = evaluate.make_reference(sessions, None, test)

    def moments(images):
        return evaluate.moments(evaluate.extract(sessions[0], images)[0])

    real = moments(left_out)
    return lambda images: float(evaluate.frechet_distance(*real, *moments(images))), reference


# --- Rows -----------------------------------------------------------------------------------------


def key(row):
    """What tells one run from another."""
    return json.dumps([row[part] for part in ("library", "recipe", "minutes", "num_samples")])


def table(rows):
    """All pairs as Markdown: ours, and below it the library of the same run."""
    text = "# Quality after equal time\n\n"
    text += "`python benchmarks/libraries.py train`: each pair is two rows, ddim.py and below it "
    text += "a library, trained\nat once on one core each.  Scores compare samples with the test "
    text += f"images; the library's guidance was\nchosen by {TRIED} samples and images that both "
    text += "trainings left out.  / ours: F-FID over that of the row\nabove, by either extractor."
    text += "\n\n"
    head = ["network", "settings", "minutes", "N", "parameters", "images seen", "evaluations"]
    head += ["F-FID", "/ ours", "F-FID, second extractor", "/ ours"]
    head += [report.HEADINGS[name] for name in SCORES[2:]]
    cells = []
    for row in rows:
        for name, side in row["sides"].items():
            settings, ratios = "defaults", dict.fromkeys(row["ratio"], "")
            if name != OURS:
                settings = [f"{part.replace('_', ' ')} {row['recipe'][part]:g}" for part in CHANGED]
                settings = ", ".join([*settings, f"guidance {side['guidance']:g}"])
                ratios = {score: f"{ratio:.2f}" for score, ratio in row["ratio"].items()}
            line = [name, settings, f"{side['seconds'] / 60:.1f}", f"{row['num_samples']:,}"]
            line += [f"{side['parameters']:,}", f"{side['images']:,}", str(side["evaluations"])]
            for score in SCORES:
                line += [f"{side['scores'][score]:.3f}"]
                line += [ratios[score]] if score in ratios else []
            cells.append(line)
    text += report.as_table(head, cells)
    machines = [
        f"{row['library']}: {row['machine']['processor']}, one core each, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in rows
    ]
    return text + "\n".join(f"- {line}" for line in dict.fromkeys(machines)) + "\n"


def planned(args):
    """The runs that the flags ask for.  Raises InputError."""
    changed = {name: getattr(args, name) for name in CHANGED if getattr(args, name) is not None}
    how = {"minutes": args.minutes, "num_samples": args.num_samples}
    for name, value in {**how, **changed}.items():
        if not LEAST[name] <= value < math.inf:
            raise InputError(
                f"--{name.replace('_', '-')} {value}: right is {LEAST[name]:g} or more"
            )
    names = [args.library] if args.library else LIBRARIES
    return [{"library": name, "recipe": RECIPES[name] | changed, **how} for name in names]


def train_all(args):
    """Compare the pairs that are not in libraries.json yet, and write its table."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the trainings end, too
    table_only = only_table(libraries.build_parser(), args)
    file = Path(args.output, "libraries.json")
    rows = json.loads(file.read_text()) if file.is_file() else []
    kept = {key(row) for row in rows}
    runs = [] if table_only else [run for run in planned(args) if key(run) not in kept]
    cores = sorted(os.sched_getaffinity(0))
    if runs and len(cores) < 2:
        raise InputError("a pair needs two cores, one for each training")
    for run in runs:
        done = subprocess.run(job_command("check", run), capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{run['library']}: {libraries.why(done.stderr)}")
    judges = make_judges(args.data_dir) if runs else None
    for run in runs:
        rows.append(compare(run, args.data_dir, cores, judges))
        with written_whole(file) as scratch:
            scratch.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        raise InputError(f"{file} has no rows yet")
    report.write_text(table(rows), file.with_suffix(".md"))
    print(table(rows))

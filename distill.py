"""Distillation of DDIM: an image in four network evaluations, or fewer, in one file (with ddim.py).

Eric Luhman, Troy Luhman, "Knowledge Distillation in Iterative Generative Models for Improved
Sampling Speed", 2021 (arXiv:2101.02388): a student learns where the deterministic walk of a teacher
ends.  Here the walk is cut into one segment for each step of the student, as in Simple and Fast
Distillation (Zhou et al. 2024, arXiv:2409.19681).  The target is that of progressive distillation
(Salimans & Ho 2022, arXiv:2202.00512), and guidance is distilled too, so that a step takes a single
evaluation (Meng et al. 2022, arXiv:2210.03142).  A step starts where the student's own steps have
led, so that it learns to correct them; the image at the end is compared in the features of the
teacher, too (Lin & Yang 2023, arXiv:2401.00110): pixels alone leave it blurred.

    implied_output  x_0 = (x_s - r * x_t) / (alpha_s - r * alpha_t),  r = sigma_s / sigma_t
                    v = (alpha_t * x_t - x_0) / sigma_t: the DDIM step from x_t with it, not
                    clipped, ends at x_s
    step_losses     || implied_output - model(x_t, t, y) ||^2,  for each step t -> s of the student,
                    and for the last w * || features(x_0) - features(x_0_hat) ||^2
    with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)

    python distill.py --train --minutes 60    learn from the newest run of ddim.py or ddpm.py, else
                                              from the included weights; needs no data set
    python distill.py --train --minutes 1     see it run
    python distill.py --class Sneaker         sample a Sneaker with the newest weights

Differs from the papers: all steps of the student are learned at once, for one guidance; the teacher
walks by DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), and each walk is used --passes times; the
features are those of all residual blocks, at one t and without noise; Muon and EMA are those of
ddim.py.  An epoch is a pass over the 64 batches of walks that are kept.
"""

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import ddim
from common import ImageData, InputError, ResidualBlock, UNet, next_noise, noise_streams, to_uint8
from ddim import (
    GUIDANCE_INTERVAL, ddim_step, dpm_pairs, dpm_sample, ema_network, guided, guided_times,
    image_losses, predict_x_0_and_eps, schedule_of, target_of, time_pairs, walk_length,
)  # fmt: skip

NAME = "distill"
SAMPLES_FROM = ("distill",)
TEACHERS = ("ddim", "ddpm")  # scripts whose networks can teach
STEPS = 4  # default number of sampling steps
TEACHER_STEPS = 15  # default
SEEN_AT = 0.9885  # alpha_bar of the t, of little noise, at which the teacher compares images
WALKS = 64  # batches of the teacher's walks that are kept, and used --passes times
FIRST_NOISE = 2**63  # index of the first noise of the training; those of samples start at 0

# --- Method ---------------------------------------------------------------------------------------


def implied_output(x_t, x_s, prediction, alpha_bar_t, alpha_bar_s):
    """The network output, eps or v, whose DDIM step from x_t, not clipped, lands on x_s.

    Salimans & Ho 2022, appendix G: x_0 = (x_s - r * x_t) / (alpha_s - r * alpha_t) with r =
    sigma_s / sigma_t.

    x_t, x_s: (B, C, H, W);  alpha_bar_t < alpha_bar_s <= 1: numbers.
    """
    r = ((1 - alpha_bar_s) / (1 - alpha_bar_t)) ** 0.5
    x_0 = (x_s - r * x_t) / (alpha_bar_s**0.5 - r * alpha_bar_t**0.5)
    eps = (x_t - alpha_bar_t**0.5 * x_0) / (1 - alpha_bar_t) ** 0.5
    return target_of(prediction, x_0, eps, alpha_bar_t)


def teacher_pairs(num_timesteps, teacher_steps, pairs):
    """Pairs like those of dpm_pairs, in which each t of `pairs` replaces the time nearest to it.

    pairs: from time_pairs.  If several replace the same time, there are more than teacher_steps.
    """
    times = [t for t, _ in dpm_pairs(num_timesteps, teacher_steps)]
    own = {t for t, _ in pairs}
    nearest = {min(times, key=lambda time: abs(time - t)) for t in own}
    times = sorted({*times} - nearest | own, reverse=True)
    return list(zip(times, [*times[1:], -1], strict=True))


def teacher_walk(denoise, x_T, alpha_bars, prediction, pairs, fine_pairs):
    """The states of the teacher's walk at the times of the student's: [x_T, ..., x_0], steps + 1.

    denoise: of ddim.guided;  x_T: (B, C, H, W) ~ N(0, 1);  pairs: from time_pairs;  fine_pairs:
    from teacher_pairs.
    """
    times = {-1, *(t for t, _ in pairs)}
    trace = []
    dpm_sample(denoise, x_T, alpha_bars, fine_pairs, prediction, trace=trace)
    return [x_t for t, x_t, _ in trace if t in times]


def feature_losses(teacher, x_0, x_0_hat, y, alpha_bars):
    """How far two images are from each other in the residual blocks of the teacher: (B,).

    The mean over blocks and pixels of || a - b ||^2, where a and b are scaled to length 1, as in
    LPIPS without its learned weights (Zhang et al. 2018, arXiv:1801.03924): 2 - 2 cos(a, b).

    teacher: UNet, given both at the t of SEEN_AT, but no noise;  x_0: (B, C, H, W) in [-1, 1];
    x_0_hat: like x_0, not clipped, so that each pixel gets a gradient;  y: int64 (B,).
    """
    t = max(int((alpha_bars > SEEN_AT).sum()) - 1, 0)  # the last whose alpha_bar is above SEEN_AT
    found = []

    def keep(block, inputs, output):
        found.append(output)

    blocks = [block for block in teacher.modules() if isinstance(block, ResidualBlock)]
    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(keep))
        for x in (x_0, x_0_hat):
            teacher(alpha_bars[t].item() ** 0.5 * x, torch.full_like(y, t), y)
    pairs = zip(found[: len(blocks)], found[len(blocks) :], strict=True)
    cosines = [F.cosine_similarity(a.float(), b.float(), dim=1).mean(dim=(1, 2)) for a, b in pairs]
    return 2 - 2 * torch.stack(cosines).mean(dim=0)


def step_losses(model, states, y, alpha_bars, prediction, pairs, loss, teacher=None, weight=0.0):
    """The loss of each step of the student: (steps, B).

    Each begins where the one before has ended, the first at x_T, and aims at the teacher's state.

    model: (x_t, t, y) -> output;  states: of teacher_walk;  y: int64 (B,);  pairs: from time_pairs;
    teacher: UNet;  weight: of the distance in its features, 0 or more.
    """
    losses = []
    x_t = states[0]
    for (t, s), x_s in zip(pairs, states[1:], strict=True):
        alpha_bar_t = alpha_bars[t].item()
        alpha_bar_s = alpha_bars[s].item() if s >= 0 else 1.0
        output = model(x_t, torch.full_like(y, t), y).float()
        target = implied_output(x_t, x_s, prediction, alpha_bar_t, alpha_bar_s)
        losses.append(image_losses(output, target, loss))
        if s < 0 and weight > 0:
            x_0_hat, _ = predict_x_0_and_eps(output, x_t, prediction, alpha_bar_t)
            losses[-1] += weight * feature_losses(teacher, x_s, x_0_hat, y, alpha_bars)
        # No gradient passes from a step to those before it.
        x_0_hat, eps_hat = predict_x_0_and_eps(output.detach(), x_t, prediction, alpha_bar_t, True)
        x_t = ddim_step(x_0_hat, eps_hat, alpha_bar_t, alpha_bar_s)
    return torch.stack(losses)


# --- Sampling -------------------------------------------------------------------------------------


def sample(model, labels, *, config=None, seed=0, batch_size=100, trace=None):
    """Sample one image per label by DDIM in config["steps"] steps, of one evaluation each.

    Arguments and result as in ddim.sample.
    """
    config = {**(config or model.config), "label_dropout": 0}
    return ddim.sample(
        model, labels, config=config, steps=config["steps"], guidance=1.0, solver="ddim", seed=seed,
        batch_size=batch_size, trace=trace,
    )  # fmt: skip


# --- Training -------------------------------------------------------------------------------------
# From here on runs.py helps; cut above this line to use the model with a trainer of your own.

from runs import (  # noqa: E402
    LOG_EVERY, RUN_FLAGS, Muon, Run, autocast, check_finite, errors_in_one_line, find_checkpoint,
    learning_rate, load_checkpoint, number, open_checkpoint, optimisation_flags, parallel,
    parse_run, path_text, pick_device, power_ema, run_parser, save_samples, training_device,
)  # fmt: skip


def read_teacher(args):
    """The checkpoint to learn from; sets the flags that it decides.  Raises InputError."""
    path = find_checkpoint(TEACHERS, args.teacher, TEACHERS)
    teacher = load_checkpoint(path, TEACHERS)
    config = teacher["config"]
    args.teacher = str(path)
    if args.guidance is None:
        args.guidance = ddim.default_guidance(config)
    if args.guidance <= 1 and "guidance_interval" in args.typed:
        raise InputError("--guidance-interval is for a guidance above 1: leave it out")
    if args.guidance == 0 and args.feature_weight > 0:
        raise InputError("--guidance 0 has no classes, features are of one: --feature-weight 0")
    length = ddim.max_steps(config)
    if args.teacher_steps is None:
        args.teacher_steps = min(TEACHER_STEPS, length)
    ddim.check_sampling(config, args.steps, args.guidance)
    if args.teacher_steps > length:
        raise InputError(
            f"--teacher-steps {args.teacher_steps} is more than the {length} timesteps of a walk"
        )
    return teacher


def train(args, checkpoint=None):
    """Train, or resume from a checkpoint, until --epochs or --minutes are over.

    Returns the exit code.
    """
    device = training_device(args)
    # A run keeps its teacher: the file may be another one when it is resumed.
    teacher = checkpoint["teacher"] if checkpoint else read_teacher(args)
    teacher = {key: teacher[key] for key in ("network", "class_names", "ema", "config")}
    config = {key: value for key, value in teacher["config"].items() if key in TAUGHT}
    config |= {key: getattr(args, key) for key in FIXED + FREE}

    # The teacher's walk has a step at each t of the student's: its states there are the targets.
    alpha_bars = schedule_of(config)
    prediction = config["prediction"]
    length = walk_length(alpha_bars, prediction)
    pairs = time_pairs(length, args.steps)
    fine_pairs = teacher_pairs(length, args.teacher_steps, pairs)
    print(f"teacher {args.teacher}, {len(fine_pairs)} steps, guidance {args.guidance:g}")
    interval = guided_times(args.guidance_interval, config["num_timesteps"])
    if args.guidance > 1 and not any(interval[0] <= t < interval[1] for t, _ in fine_pairs):
        print(f"guidance {args.guidance:g} counts as 1: no step lies in --guidance-interval")
    image_size = config.get("image_size", 32)
    shape = (config["channels"], image_size, image_size)

    # The student starts as the teacher.
    teacher_model = ema_network(teacher, device)
    model = UNet(**teacher["network"]).to(device, memory_format=torch.channels_last)
    model.load_state_dict(teacher["ema"])
    forward = parallel(torch.compile(model) if args.compile else model)
    options = {"weight_decay": args.weight_decay, "fused": device.type != "mps"}
    optimizer = Muon(model.named_parameters(), args.lr, **options)
    ema_model = AveragedModel(model, multi_avg_fn=power_ema(args.ema_length)).eval()
    sums = torch.zeros(args.steps, device=device)  # of the loss of each step of the walk
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        ema_model.module.load_state_dict(checkpoint["ema"])
        ema_model.n_averaged.fill_(checkpoint["step"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        sums.copy_(torch.tensor(checkpoint["sums"]))
    precision = autocast(device, args.bf16)

    @torch.no_grad()
    def states_of(streams, y):
        """The teacher's states at the times of the student, from the noise of `streams`."""
        x_T = torch.from_numpy(next_noise(streams, shape)).to(device)
        denoise = guided(teacher_model, y, args.guidance, *interval)
        return teacher_walk(denoise, x_T, alpha_bars, prediction, pairs, fine_pairs)

    # The log compares its samples with those of its teacher from the same noise.
    num_classes = len(teacher["class_names"])
    grid_labels = torch.arange(min(10, num_classes)).repeat_interleave(8)
    streams = noise_streams(0, range(len(grid_labels)))
    images = states_of(streams, grid_labels.to(device))[-1].cpu()
    check_finite(images)
    data = ImageData(to_uint8(images), grid_labels, teacher["class_names"][:10], args.teacher)
    run = Run(NAME, args, data, checkpoint, walks=WALKS * args.batch_size)

    def walk(batch):
        """Classes and teacher's states of batch number `batch`: this process's rows of it."""
        [rows] = run.shard(torch.arange(args.batch_size) + batch * args.batch_size)
        y = (rows % num_classes).to(device)
        streams = noise_streams(args.seed, [FIRST_NOISE + i for i in rows.tolist()])
        with precision:  # bfloat16 moves the images by a third of a grey level
            return y, states_of(streams, y)

    def save():
        grid = sample(model=ema_model.module, config=config, labels=grid_labels)
        state = {
            "config": config, "network": teacher["network"], "class_names": teacher["class_names"],
            "weights": model.state_dict(), "ema": ema_model.module.state_dict(),
            "optimizer": optimizer.state_dict(), "sums": sums.tolist(), "teacher": teacher,
        }  # fmt: skip
        run.save(state, grid, grid_labels)

    size = sum(p.numel() for p in model.parameters())
    print(f"run {run} on {device}, {size:,} parameters", flush=True)
    walks = {}  # {batch number: (y, states)}; (steps + 1) * WALKS batches of images in all
    with run:
        for step in run.steps(save):
            # The rate ends at 0 just when the run does, whether that is by epochs or by minutes.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step, run.progress)

            # A walk costs as much as a step of training, or more: each is used --passes times.
            # Its noise depends on its number alone: a resumed run repeats it exactly.
            epoch, i = divmod(step, WALKS)
            batch = epoch // args.passes * WALKS + i
            if batch not in walks:
                walks = {key: value for key, value in walks.items() if key > batch - WALKS}
                walks[batch] = walk(batch)
            y, states = walks[batch]

            # The target of Salimans & Ho 2022, algorithm 2, for all steps of the student at once.
            with precision:
                losses = step_losses(
                    forward, states, y, alpha_bars, prediction, pairs, args.loss, teacher_model,
                    args.feature_weight,
                )  # fmt: skip
            loss = losses.mean()

            # Clipping bounds what one bad batch can do; a loss that is not finite ends the run.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            run.watch(loss=loss.item(), gradient=grad_norm.item())
            optimizer.step()
            ema_model.update_parameters(model)

            # Which steps does it learn?
            sums += run.mean(losses.detach().mean(dim=1))
            if (step + 1) % LOG_EVERY == 0:
                means = (sums / LOG_EVERY).tolist()
                run.log({
                    "loss": sum(means) / len(means), "loss_by_step": means,
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
                })  # fmt: skip
                sums.zero_()
    return run.end()


# --- Run state ------------------------------------------------------------------------------------

# What a student has from its teacher, the flags that make the run what it is, and those that may
# change when it is resumed.
TAUGHT = (
    "data", "data_dir", "hold_out", "background", "image_size", "channels", "num_timesteps",
    "schedule", "prediction", "label_dropout",
)  # fmt: skip
FIXED = (
    "teacher", "steps", "guidance", "guidance_interval", "teacher_steps", "passes",
    "loss", "feature_weight", "weight_decay", "batch_size", "ema_length", "seed",
)  # fmt: skip
# Not free here: a student reads no data, and each walk belongs to its batch.
OF_DATA = ("data", "data_dir", "skip_broken", "batch_size")
FREE = (
    *(key for key in RUN_FLAGS if key not in OF_DATA), "lr", "warmup", "grad_clip", "bf16",
    "compile",
)  # fmt: skip

# --- Command line ---------------------------------------------------------------------------------


def build_parser():
    parser = run_parser(NAME, __doc__, batch_size=32, data=False)
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--teacher", type=path_text,
        help="a .pt file or a run's folder of ddim.py or ddpm.py to learn from (newest run, else "
             "the included weights)")
    add("--steps", type=number(int, 1, 16), default=STEPS,
        help="number of sampling steps, 1 to 16, of one network evaluation each; with many, a step "
             f"can hardly correct those before it ({STEPS})")
    add("--guidance", type=number(float, 0, 1000),
        help="guidance weight of the teacher, 0 to 1000: 0 ignores the class, 1 is conditional, "
             "above 1 guided (1 or 0 where labels were dropped never or always, else "
             f"{ddim.GUIDANCE:g})")
    low, high = GUIDANCE_INTERVAL
    add("--guidance-interval", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"),
        default=GUIDANCE_INTERVAL,
        help="guidance above 1 acts only at LOW T <= t < HIGH T, T the training timesteps "
             f"({low} {high})")
    add("--teacher-steps", type=number(int, 1, 100_000),
        help="number of steps of the teacher's walk, 1 to as many as it can take; more where it "
             f"would not pass all times of the student ({TEACHER_STEPS})")
    add("--passes", type=number(int, 1, 1000), default=4,
        help="how often each walk is used, 1 to 1000 (4)")
    add("--loss", choices=("l2", "l1", "huber"), default="l2",
        help="distance between prediction and target (l2)")
    add("--feature-weight", type=number(float, 0), default=1.5,
        help="weight of the distance between image and target in the teacher's features, 0 or "
             "more (1.5)")
    # fmt: on
    optimisation_flags(parser, lr=3e-3)
    return parser


def draw(args):
    """Sample from a checkpoint and write the images."""
    opened = open_checkpoint(args, NAME, SAMPLES_FROM)
    _, checkpoint, classes, _ = opened
    labels = torch.tensor(classes).repeat_interleave(args.num_samples)
    model = ema_network(checkpoint, pick_device(args.device))
    images = sample(model, labels, seed=args.seed, batch_size=args.batch_size)
    options = {"steps": checkpoint["config"]["steps"], "seed": args.seed}
    save_samples(args, NAME, opened, images, labels, options)
    return 0


def main(argv=None):
    parser = build_parser()
    with errors_in_one_line(parser):
        args, checkpoint = parse_run(parser, argv, (NAME,), FIXED, FREE)
        return train(args, checkpoint) if args.train or args.resume else draw(args)


if __name__ == "__main__":
    sys.exit(main())

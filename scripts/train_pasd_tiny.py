"""Train and export `sdconvert/assets/pasd_tiny`, stage by stage; each stage can be stopped and goes on where it was.

python scripts/train_pasd_tiny.py --stage vae --minutes 12
python scripts/train_pasd_tiny.py --stage decoder --minutes 15
torchrun --nproc-per-node 2 scripts/train_pasd_tiny.py --stage diffusion --minutes 100 --threads 1
python scripts/train_pasd_tiny.py --stage export
python scripts/train_pasd_tiny.py --stage evaluate
"""

import argparse
from pathlib import Path

import torch
from pasd_tiny.diffusion import train_diffusion
from pasd_tiny.evaluate import evaluate
from pasd_tiny.export import export
from pasd_tiny.text import write_tokenizer
from pasd_tiny.vae import train_decoder, train_vae
from torch import distributed
from transformers import CLIPTokenizer

ASSET = Path(__file__).resolve().parent.parent / "sdconvert" / "assets" / "pasd_tiny"
STAGES = ("tokenizer", "vae", "decoder", "diffusion", "export", "evaluate")


def main() -> None:
    """Read the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument(
        "--minutes",
        type=float,
        default=12.0,
        help="budget of a training stage, earlier runs included",
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wheel", type=Path, help="stage tokenizer: the open_clip_torch wheel")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[4],
        help="stage evaluate: numbers of sampler steps",
    )
    parser.add_argument("--initial", type=Path, help="stage diffusion: an exported folder to start from")
    parser.add_argument("--folder", type=Path, default=ASSET, help="stages export and evaluate: the model's folder")
    parser.add_argument("--pictures", type=Path, help="stage evaluate: where to write the pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stage == "tokenizer":
        if arguments.wheel is None:
            parser.error("--stage tokenizer needs --wheel; get it with: pip download --no-deps open_clip_torch==3.3.0")
        write_tokenizer(arguments.wheel, ASSET / "tokenizer")
    elif arguments.stage == "evaluate":
        evaluate(arguments.folder, arguments.steps, arguments.pictures)
    elif arguments.stage == "export":
        export(arguments.folder, _tokenizer())
    else:
        _train(arguments)


def _train(arguments: argparse.Namespace) -> None:
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    common = (arguments.seed, arguments.minutes, arguments.device)
    match arguments.stage:
        case "vae":
            train_vae(*common)
        case "decoder":
            train_decoder(*common)
        case "diffusion":
            train_diffusion(*common, _tokenizer(), arguments.initial)


def _tokenizer() -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(ASSET / "tokenizer", local_files_only=True)
    return tokenizer


if __name__ == "__main__":
    main()

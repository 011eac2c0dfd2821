"""Folder of videos to face crops and mels, packed as the TFDS data set that configs/wav2lip.py:data=FOLDER trains on.

A job that is stopped and started again goes on with the next video. Videos that are damaged, without sound or with too
few faces are named and left out.
"""

import argparse
import shutil
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.media.face_crops import SPLITS, Detect, find_videos, pack, prepare
from ..storage.paths import as_path
from .face_detection import make_detector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", required=True, type=as_path, help="folder of videos, at any depth")
    parser.add_argument("--lists", type=as_path, help="folder with train.txt and test.txt or val.txt, as LRS2 has them")
    parser.add_argument("--out", required=True, type=as_path, help="folder for the clips and the data set")
    parser.add_argument("--detector", default="", help="s3fd.pth; default: MTCNN with the weights of the package mtcnn")
    parser.add_argument("--min-face", type=int, default=40, help="smallest face MTCNN looks for, in pixels")


def run(arguments: argparse.Namespace) -> None:
    found = find_videos(arguments.videos, arguments.lists)
    videos = {
        _target(arguments.out / "clips", split, f"{video.relative_to(arguments.videos)}.npz", arguments.lists): video
        for split, chosen in found.items()
        for video in chosen
    }
    waiting = {target: video for target, video in videos.items() if not target.exists()}
    if waiting:
        detect = make_detector(arguments.detector, min_face=arguments.min_face)
        columns = TextColumn("find faces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns) as progress:
            task = progress.add_task("videos", total=len(videos), completed=len(videos) - len(waiting))
            for target, video in waiting.items():
                if reason := _prepare(video, target, detect):
                    line = f"left out {video}: {reason.removeprefix(f'{video} ')}"
                    progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
                else:
                    shutil.rmtree(arguments.out / "tfds", ignore_errors=True)  # packed before this clip was ready
                progress.advance(task)
    ready = sum(target.exists() for target in videos)
    if not ready:
        raise ValueError(f"none of the {len(videos)} videos in {arguments.videos} could be prepared")
    pack(arguments.out)
    print(f"{ready} of {len(videos)} videos are clips in {arguments.out}")


def _target(clips: Path, split: str, name: str, lists: Path | None) -> Path:
    """Without lists a clip stays in its split when further videos move the others: none is in both."""
    made = (clips / other / name for other in SPLITS if lists is None)
    return next((target for target in made if target.exists()), clips / split / name)


def _prepare(video: Path, target: Path, detect: Detect) -> str:
    """Why the video was left out, "" if it was not; one bad file does not end a job of days."""
    try:
        return prepare(video, target, detect)
    except ValueError as error:
        return str(error)

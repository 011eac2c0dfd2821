"""Folder of videos to face crops and mels, packed as the TFDS data set that configs/wav2lip.py:data=FOLDER trains on.

A job that is stopped and started again goes on with the next video.
"""

import argparse
import shutil
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.face_crops import FaceCrops, find_videos, prepare
from .face_detection import make_detector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", required=True, type=Path, help="folder of videos, at any depth")
    parser.add_argument("--lists", type=Path, help="folder with train.txt and test.txt or val.txt, as LRS2 has them")
    parser.add_argument("--out", required=True, type=Path, help="folder for the clips and the data set")
    parser.add_argument("--detector", default="", help="s3fd.pth; default: MTCNN with the weights of the package mtcnn")
    parser.add_argument("--min-face", type=int, default=40, help="smallest face MTCNN looks for, in pixels")


def run(arguments: argparse.Namespace) -> None:
    found = find_videos(arguments.videos, arguments.lists)
    targets = {
        video: arguments.out / "clips" / split / video.relative_to(arguments.videos).with_suffix(".npz")
        for split, videos in found.items()
        for video in videos
    }
    waiting = {video: target for video, target in targets.items() if not target.exists()}
    left_out = {}
    if waiting:
        detect = make_detector(arguments.detector, min_face=arguments.min_face)
        columns = TextColumn("find faces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns) as progress:
            task = progress.add_task("videos", total=len(targets), completed=len(targets) - len(waiting))
            for video, target in waiting.items():
                try:
                    left_out[video] = prepare(video, target, detect)
                except ValueError as error:  # one bad file does not end a job of days
                    left_out[video] = str(error)
                progress.advance(task)
    for video, reason in left_out.items():
        if reason:
            print(f"left out {video}: {reason}")
    ready = sum(target.exists() for target in targets.values())
    if not ready:
        raise ValueError(f"none of the {len(targets)} videos in {arguments.videos} could be prepared")
    if waiting:
        shutil.rmtree(arguments.out / "tfds", ignore_errors=True)  # packed before these were ready
    FaceCrops(arguments.out).download_and_prepare()
    print(f"{ready} of {len(targets)} videos are clips in {arguments.out}")

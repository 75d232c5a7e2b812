#!/usr/bin/env python3
"""Take a picture of a run's TensorBoard dashboard with a headless browser.

    python scripts/dashboard_screenshot.py outputs/RUN docs/img/dashboard.png

Needs the package tensorboard and Chromium (Debian: apt-get install --no-install-recommends chromium).
Nothing leaves this machine: the server listens on 127.0.0.1 and stops with the script.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A sandboxed machine without a GPU draws through SwiftShader; the virtual clock lets the charts load first.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--virtual-time-budget=25000",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Return once TensorBoard at `url` lists a run with scalars; exit if it stops or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"tensorboard stopped with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(url + "data/plugin/scalars/tags", timeout=5) as response:
                if response.read().strip() not in (b"", b"{}"):
                    return
        except (urllib.error.URLError, TimeoutError):
            pass  # the server is still starting; the deadline above ends the wait
        time.sleep(0.5)
    sys.exit(f"no scalars within {seconds:.0f} s: does the folder contain TensorBoard events?")


def take(run_folder: Path, picture: Path, width: int, height: int, page: str) -> None:
    """Serve `run_folder` on 127.0.0.1 and write the page as a PNG of width x height pixels."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser found: none of {', '.join(BROWSERS)} is on the PATH; on Debian: apt-get install chromium")
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_folder), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(url, server, seconds=60)
        picture.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            where = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture}"]
            shot = [browser, *FLAGS, *where, f"{url}#{page}"]
            subprocess.run(shot, check=True, timeout=180, stderr=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="a run's folder, or a folder of runs")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1600, help="pixels")
    parser.add_argument("--height", type=int, default=1150, help="pixels")
    parser.add_argument("--page", default="custom_scalars", help="custom_scalars, text, hparams, timeseries")
    args = parser.parse_args()
    take(args.run_folder, args.picture.absolute(), args.width, args.height, args.page)
    print(f"{args.picture}: {args.picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()

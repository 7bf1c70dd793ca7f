"""The verbs of the command line that ship a package to a Triton server."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.errors import UserError
from calib.store.paths import expanded
from deploy.arguments import architectures, count
from deploy.engine.backends import TENSORRT
from deploy.errors import EXIT_FAILED, EXIT_USER_ERROR
from deploy.package_options import add_package_options, folder_from_options

REPOSITORY = "models"
URL = "127.0.0.1:8000"
ALLOWANCES = {
    "random_weights": "serve a package of random weights: for latency work only",
    "sample_calibration": "serve a package calibrated on the built-in sample images",
    "unexecuted": "serve an engine that was never run",
}


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo", default=REPOSITORY, help=f"folder of the model repository (default {REPOSITORY})")


def _add_allowances(parser: argparse.ArgumentParser) -> None:
    for name, meaning in ALLOWANCES.items():
        parser.add_argument(f"--allow-{name.replace('_', '-')}", action="store_true", help=meaning)


def add_serve_verbs(verbs: Any) -> None:
    """Add the verbs to the sub-parsers of the command line."""
    write = verbs.add_parser("serve-repo", help="write packages as a Triton model repository")
    write.add_argument("packages", nargs="*", help="folders, of several models or GPUs; default: that of these options")
    add_package_options(write)
    again = verbs.add_parser("rebuild", help="build the engine of a finished package for this machine; needs no torch")
    again.add_argument("package", help="folder")
    again.add_argument("--to", help="another folder for the package (default: its own)")
    again.add_argument("--target", default="auto", help="auto, tensorrt, tensorrt_rtx or onnxruntime (a CPU)")
    again.add_argument("--sm", type=architectures, help="GPU architectures for tensorrt_rtx, such as 86,89,120")
    again.add_argument("--builder", default="", help="what TensorRT's builder is told: level=5,gpus=ampere+")
    again.add_argument("--batch", type=count, help="batch size the engine is tuned for (default: the package's)")
    again.add_argument("--max-batch", type=count, help="largest batch size (default: the package's)")
    preflight = verbs.add_parser("preflight", help="whether a package may be served, and whether this machine can")
    preflight.add_argument("packages", nargs="+", help="folders, of several models served together")
    preflight.add_argument("--cpu", action="store_true", help="only its graph is served, in ONNX Runtime")
    container = preflight.add_mutually_exclusive_group()
    container.add_argument("--triton", metavar="TAG", help="container of the server: 26.07-trtllm-python-py3")
    container.add_argument("--tensorrt", metavar="VERSION", help="version of TensorRT in the server's container")
    activate = verbs.add_parser("activate", help="switch a running Triton server to packages, or back where one fails")
    activate.add_argument("packages", nargs="+", help="folders, of several models or GPUs; all are switched, or none")
    back = verbs.add_parser("rollback", help="switch a running Triton server to the version before")
    back.add_argument("names", nargs="+", metavar="name", help="of a model, as serve-repo printed it, without _cpu")
    serve = verbs.add_parser("serve", help="run a Triton server without a GPU on loopback: it serves the _cpu models")
    serve.add_argument("--environment", default=".venv-triton", help="where nvidia-pytriton is (default .venv-triton)")
    for parser in (write, preflight, activate, back, serve):
        _add_common(parser)
    for parser in (write, preflight, activate):
        _add_allowances(parser)
    for parser in (write, activate):
        parser.add_argument("--name", help="of the one model in the repository (default: each package's own)")
    for parser in (activate, back):
        parser.add_argument("--url", default=URL, help=f"host:port of the server's HTTP service (default {URL})")
    write.add_argument(
        "--file", dest="files", action="append", default=[], help="what to put beside the models; repeat it"
    )
    write.add_argument("--labels", help="text file with the names of a classifier's classes, one a line")


def _allowed(args: argparse.Namespace) -> Any:
    from deploy.serve.preflight import Allowed

    return Allowed(**{name: getattr(args, f"allow_{name}") for name in ALLOWANCES})


def _repository(args: argparse.Namespace) -> Path:
    return expanded(args.repo, "REPO")


def _require_client() -> None:
    """Raise UserError where the Triton client, which also writes its configurations, is not installed."""
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"the Triton client is not installed here ({error}): use `make serve-repo`, or an environment with "
            f"requirements-serve.txt"
        ) from error


def _refused(folder: Path, wrong: Sequence[str]) -> bool:
    for sentence in wrong:
        print(f"error: {folder}: {sentence}", file=sys.stderr)
    return bool(wrong)


def _unfit(folders: Sequence[Path], args: argparse.Namespace) -> bool:
    """Whether a package must not be served: changed files, random weights, sample calibration."""
    from deploy.serve.preflight import promise_faults
    from deploy.serve.shipped import shipped_from_package
    from deploy.verify import file_faults

    found = [
        [*file_faults(each), *promise_faults(shipped_from_package(each), _allowed(args), cpu=True)] for each in folders
    ]
    return any([_refused(folder, wrong) for folder, wrong in zip(folders, found, strict=True)])


def _serve_repo(args: argparse.Namespace) -> int:
    from deploy.serve.repository import engine_obstacle, write_repository
    from deploy.serve.shipped import shipped_from_package

    folders = [folder_from_options(args, each) for each in args.packages or [None]]
    if _unfit(folders, args):
        return EXIT_USER_ERROR
    _require_client()
    packages, repository, allowed = [shipped_from_package(each) for each in folders], _repository(args), _allowed(args)
    labels = expanded(args.labels, "LABELS") if args.labels else None
    files = [expanded(each, "FILES") for each in args.files]
    names = write_repository(packages, repository, args.name, allowed, labels, files)
    for each in packages:
        if reason := engine_obstacle(each, allowed):
            which = f" of '{each.model}'" if len(packages) > 1 else ""
            print(f"no engine{which} in the repository: {reason}", file=sys.stderr)
    print(f"written to {repository}: {', '.join(names)}")
    return 0


def _how(backend: str, cpu: bool) -> str:
    """By what a package may be served, where that is not Triton with the engine itself."""
    if cpu:
        return " by its graph in ONNX Runtime"
    if backend == TENSORRT:
        return ""
    return f", but not by Triton, which loads engines of {TENSORRT} alone: its engine is of {backend} (--cpu for its graph)"


def _preflight(args: argparse.Namespace) -> int:
    from deploy.serve.bundle import models_of
    from deploy.serve.containers import tensorrt_of_container
    from deploy.serve.preflight import preflight, this_machine
    from deploy.serve.shipped import shipped_from_package

    folders = [expanded(each, "PACKAGE") for each in args.packages]
    tensorrt = tensorrt_of_container(args.triton) if args.triton else args.tensorrt
    packages, machine = [shipped_from_package(each) for each in folders], this_machine(_repository(args), tensorrt)
    models_of(packages)
    refused = []
    for folder, shipped in zip(folders, packages, strict=True):
        refused.append(_refused(folder, preflight(folder, machine, _allowed(args), args.cpu)))
        machine = replace(machine, free_disk=machine.free_disk - shipped.bytes)  # they lie on the disk together
    if any(refused):
        return EXIT_USER_ERROR
    for folder, shipped in zip(folders, packages, strict=True):
        print(f"{folder}: may be served here{_how(shipped.backend, args.cpu)}")
    return 0


def _rebuild(args: argparse.Namespace) -> int:
    from deploy.engine.builder import Builder
    from deploy.serve.rebuild import Changes, rebuild
    from deploy.verify import broken_limits

    changes = Changes(args.target, args.sm, Builder.from_text(args.builder), args.batch, args.max_batch)
    if args.to is not None and not args.to.strip():
        raise UserError("--to is empty: expected a folder, or no --to to build the engine in the package itself")
    to = expanded(args.to, "--to") if args.to else None
    try:
        place, told = rebuild(expanded(args.package, "PACKAGE"), changes, to)
    except UserError as error:  # folders are called otherwise here than by `make engine`
        raise UserError(str(error).replace("with OUT=", "with --to")) from error
    print("\n".join(told))
    broken = broken_limits(place)
    for limit in broken:
        print(f"{place}: not to be served: {limit}", file=sys.stderr)
    return EXIT_FAILED if broken else 0


def _told(switched: Mapping[str, tuple[int, int]]) -> None:
    for model, (before, now) in switched.items():
        print(f"{model}: version {now} serves, before it {before}")


def _activate(args: argparse.Namespace) -> int:
    folders = [expanded(each, "PACKAGE") for each in args.packages]
    if _unfit(folders, args):
        return EXIT_USER_ERROR
    _require_client()
    from deploy.serve.activate import activate
    from deploy.serve.client import Client
    from deploy.serve.shipped import shipped_from_package

    packages = [shipped_from_package(each) for each in folders]
    _told(activate(packages, _repository(args), Client(args.url), args.name, _allowed(args)))
    return 0


def _rollback(args: argparse.Namespace) -> int:
    _require_client()
    from deploy.serve.activate import rollback
    from deploy.serve.client import Client

    _told(rollback(_repository(args), Client(args.url), *args.names))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from deploy.serve.server import serve

    serve(expanded(args.environment, "ENVIRONMENT"), _repository(args))
    return 0


SERVE_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve-repo": _serve_repo,
    "rebuild": _rebuild,
    "preflight": _preflight,
    "activate": _activate,
    "rollback": _rollback,
    "serve": _serve,
}

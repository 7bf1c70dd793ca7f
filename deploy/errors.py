"""The exception for a result that breaks a promise of the tool, and the exit codes of the command line."""

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class ContractError(Exception):
    """The result is not what the tool promises: a layer does not run in INT8, parity fails, FP16 overflows.

    The command line prints the message and exits with code 1; no package is written.
    """

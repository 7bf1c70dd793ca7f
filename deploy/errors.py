"""The exception of a result that does not hold."""


class ContractError(Exception):
    """The tool did its work and the result is not what it promises: INT8 lost, parity broken, FP16 overflow.

    The command line prints it and exits with code 1; nothing is shipped.
    """

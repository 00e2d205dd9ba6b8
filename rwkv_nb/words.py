"""Times and sizes in the words a person uses."""


def duration_text(seconds: float) -> str:
    """8 s, 3 min 20 s, 2 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def bytes_text(n: float) -> str:
    """512 MB, 3.41 GB: three digits, in powers of 1000."""
    return _scaled(n, ("GB", "MB", "kB")) or f"{n:.0f} bytes"


def number_text(n: float) -> str:
    """191 M, 2.95 B: the same of what is counted."""
    return _scaled(n, ("B", "M", "k")) or f"{n:g}"


def _scaled(n: float, units: tuple[str, str, str]) -> str:
    """n in the largest of the units (10⁹, 10⁶, 10³) that it reaches when rounded; "" where it reaches none."""
    for size, unit in zip((1e9, 1e6, 1e3), units, strict=True):
        if n >= 0.9995 * size:
            digits = f"{n / size:.3g}" if n < 999.5 * size else f"{n / size:.0f}"
            return f"{digits} {unit}"
    return ""

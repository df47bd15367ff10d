"""Whether the Hugging Face hub answers, asked once and with a limit that name look-ups keep to as well."""

import threading
import urllib.error
import urllib.request

from torchtitan_rd.job import variables

SECONDS = 5.0
_HUB = "https://huggingface.co"


def endpoint() -> str:
    """The address of the hub, or of the mirror that HF_ENDPOINT names."""
    return variables("HF_ENDPOINT").get("HF_ENDPOINT", _HUB).rstrip("/")


def why_unreachable(seconds: float = SECONDS) -> str | None:
    """None if the hub answers, else why it does not. Nothing is downloaded but one line of its listing.

    A look-up of a name knows no limit of its own, so the question is asked in a thread that may be left.
    """
    if variables("HF_HUB_OFFLINE").get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    said = [f"no answer within {seconds:.0f} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{endpoint()}/api/models?limit=1", timeout=seconds):
                said[0] = ""
        except urllib.error.URLError as error:  # HTTPError too: a proxy that forbids it
            said[0] = str(error.reason)
        except (OSError, ValueError) as error:
            said[0] = f"{type(error).__name__}: {error}"

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 1.0)
    return said[0] or None

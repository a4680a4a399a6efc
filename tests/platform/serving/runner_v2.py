"""vLLM's model runner V2 without a GPU, started by test_vllm.py: print what it generates.

V2 lays its steps out with Triton kernels, and vLLM for CPUs uses Triton only where that has a back
end called "cpu". The package has none. Kernels that are interpreted need none but in name.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import Backend, backends


class InName:
    """A driver that is never asked to run anything."""

    @staticmethod
    def is_active() -> bool:
        return False


backends["cpu"] = Backend(compiler=None, driver=InName)

from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine  # noqa: E402  vLLM looks at once

asked = json.loads(sys.argv[1])
for folder in asked["folders"]:
    with Engine(Asked(Path(folder), **asked["engine"])) as running:
        found = running.generate(asked["prompts"], asked["new"])
        runner = running.effective()["runner"]
    print(json.dumps({"runner": runner, "ids": [one.ids for one in found]}), flush=True)

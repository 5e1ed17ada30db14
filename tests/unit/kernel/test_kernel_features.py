"""What a missing feature says."""

import pytest

from services.common import errors
from services.common.kernel.features import Feature, Features


def test_everything_missing_is_named_with_its_remedy() -> None:
    found = Features(
        (
            Feature("bpffs", False, "/x is not a bpf file system", "mount -t bpf bpf /x"),
            Feature("ringbuf", True, "fine"),
            Feature("nft", False, "nft is missing", "apt-get install nftables"),
        )
    )
    with pytest.raises(errors.FailedPrecondition) as caught:
        found.require()
    assert str(caught.value) == (
        "/x is not a bpf file system; nft is missing; mount -t bpf bpf /x; apt-get install nftables"
    )


def test_an_optional_feature_may_be_missing() -> None:
    Features((Feature("tcx", False, "no tcx", "newer kernel", required=False),)).require()


def test_missing_capabilities_are_a_matter_of_permission() -> None:
    with pytest.raises(errors.PermissionDenied):
        Features((Feature("capabilities", False, "this process lacks CAP_BPF", "run it as root"),)).require()

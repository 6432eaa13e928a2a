"""What all unit tests share."""

from collections.abc import Iterator

import pytest

from moegen import emit


@pytest.fixture(autouse=True, scope="session")
def no_published_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packages begin without a record, whatever has been tuned: `tuned_configs/` grows with every release."""
    own = emit.data_folder
    empty = tmp_path_factory.mktemp("no_records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "data_folder", lambda name: empty if name == "tuned_configs" else own(name))
        yield

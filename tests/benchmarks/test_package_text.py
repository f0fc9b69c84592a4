"""Docstrings of installed packages: each once, named from its package; one that is not there is refused."""

import pytest

from benchmarks.package_text import package_documents, package_sources, package_version
from benchmarks.quality_model import texts
from bwla_compiler.errors import DemoError


def test_documents_and_their_sources_have_the_package_s_name() -> None:
    documents = package_documents("rich")
    assert len({document.name for document in documents}) == len(documents) > 10
    assert {document.name for document in documents} <= package_sources("rich").keys()
    assert all(path.is_file() for path in package_sources("rich").values())
    assert package_version("rich")


@pytest.mark.exhaustive  # reads all of the standard library
def test_a_package_adds_text_and_its_held_out_files_add_code() -> None:
    kept, held_out, code = texts(0, fraction=0.06, packages=["rich"])
    names = [document.name for document in kept + held_out]
    of_rich = [name for name in names if name.startswith("rich/")]
    assert len(set(names)) == len(names) > len(of_rich) > 0
    assert {document.name for document in code} <= {document.name for document in held_out}


def test_a_package_that_is_not_installed_is_refused() -> None:
    with pytest.raises(DemoError, match="no_such: no package of that name"):
        package_documents("no_such")

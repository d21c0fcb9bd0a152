"""Plain text and books as documents for pretraining, {"text": str}.

    python -m data.text books.jsonl.gz documents.jsonl
    python -m data.text folder_of_txt_files documents.jsonl.gz

The source is a .txt file, a folder of them, or JSON Lines with a "text" a row; title, author and
other keys are left out, and CRLF becomes LF.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.records import load_texts, run_converter


def read_documents(path: str | Path) -> tuple[list[dict[str, str]], Counter[str]]:
    """The documents of a file or folder and their extent; raises DataError, OSError."""
    documents = [{"text": text} for text in load_texts(path)]
    characters = sum(len(document["text"]) for document in documents)
    return documents, Counter({"documents": len(documents), "characters": characters})


def main(argv: Sequence[str] | None = None) -> None:
    run_converter(__doc__, argv, lambda args: read_documents(args.source))


if __name__ == "__main__":
    main()

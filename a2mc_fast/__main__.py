"""`python -m a2mc_fast`: which commands there are."""

COMMANDS = {
    "prepare": "recordings or a converted data set into one packed file",
    "train": "pretrain an encoder",
    "evaluate": "kNN, linear, fine-tuning, ensembles, tables",
    "predict": "classes of clips and recordings",
    "embed": "features of a data set, or the encoder as a program",
    "ablate": "the paper's ablations on own data",
    "plots": "pictures of runs and results",
}

if __name__ == "__main__":
    for name, does in COMMANDS.items():
        print(f"python -m a2mc_fast.{name:<10}{does}")
    print("Each takes --help, and is also installed as a2mc-NAME.")

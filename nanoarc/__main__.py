""" python -m nanoarc COMMAND, and torchrun ... -m nanoarc COMMAND on several ranks """
from nanoarc.cli import main

if __name__ == '__main__':
    main()

"""`python -m e2kd.trainers.timm`"""

from e2kd.trainers.timm.launching import main

if __name__ == "__main__":
    main()

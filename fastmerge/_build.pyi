REVISION: str
COMPILER: str
NO_CORE: str
CUDA: str
NO_CUDA: str

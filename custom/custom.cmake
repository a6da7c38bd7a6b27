# For algorithms that need another library: copy this file beside their sources (the folder that AI3_CUSTOM names, or
# that of the files given to ai3.register_algorithm). CMake, which must be on PATH, then builds them, and reads this
# file once the target `ai3_algorithm` is there, one library (MODULE) an algorithm.
#
# The lines for OpenMP; other packages go the same way. The environment variable CMAKE_PREFIX_PATH says where else to
# look for them.
#
# find_package(OpenMP REQUIRED)
# target_link_libraries(ai3_algorithm PRIVATE OpenMP::OpenMP_CXX)
#
# Flags and definitions of your own:
#
# target_compile_options(ai3_algorithm PRIVATE -funroll-loops)
# target_compile_definitions(ai3_algorithm PRIVATE USE_FAST_PATH)

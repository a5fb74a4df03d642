// Dtypes as functions of avx512.cpp files take them: raw pointers, as those files may include nothing that other files
// include (CMakeLists.txt).
#pragma once

#include <stdint.h>

namespace pera::avx512 {

enum class Type { kFloat, kBFloat16, kHalf };

} // namespace pera::avx512

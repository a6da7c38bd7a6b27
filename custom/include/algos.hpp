// Headers written for aithree include this file as well; what it declared is in ai3.hpp.
#pragma once

#include <ai3.hpp>

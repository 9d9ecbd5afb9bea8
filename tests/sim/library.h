// What every simulated library exports to Python.
#pragma once

#include "runtime.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

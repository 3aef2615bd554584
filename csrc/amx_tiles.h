// The tile registers of AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// The tile registers of this thread, all of 16 rows of 64 bytes, for as long as this object lives.
class TileUnit {
public:
    TileUnit() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
};

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit

// Every path of instructions of the machine that this runs on against sums in double, also where no Python is: for AArch64
// under an emulator. Prints the paths that were checked; exit code 1 at the first difference.
#include "../../src/uniprune/runtime/kernel.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 numbers(0);

template <class T> int check(int type, int path, int64_t rows, int64_t columns, double kept, bool dense) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<T> weight(rows * columns), values(rows * columns + WORD), back(rows * columns), bias(rows);
    std::vector<uint8_t> bits(rows * row_bytes(columns));
    std::vector<int64_t> offsets(rows + 1);
    for (auto& one : weight) {
        narrow(std::abs(uniform(numbers)) < kept || dense ? uniform(numbers) : 0.0f, one);
    }
    if (rows > 2 && !dense) std::fill(weight.begin() + columns, weight.begin() + 2 * columns, T{});
    for (auto& one : bias) narrow(uniform(numbers), one);
    int64_t count = bitmask_count(weight.data(), rows * columns, type, path);
    if (count && bitmask_pack(weight.data(), rows, columns, type, path, bits.data(), values.data(), count - 1) != -1) return 8;
    if (count != bitmask_pack(weight.data(), rows, columns, type, path, bits.data(), values.data(), count)) return 1;
    if (count != bitmask_offsets(bits.data(), rows, columns, offsets.data())) return 2;
    for (size_t i = count; i < values.size(); ++i) narrow(NAN, values[i]);  // what lies past the last must not matter
    Matrix m{values.data(), bits.data(), offsets.data(), bias.data(), rows, columns, type, path};
    if (dense) m.values = weight.data(), m.bits = nullptr, m.offsets = nullptr;
    bitmask_unpack(&m, 0, rows, back.data(), 1);
    if (std::memcmp(back.data(), weight.data(), weight.size() * sizeof(T))) return 3;
    for (int batch = 1; batch <= 8; ++batch) {
        std::vector<T> x(batch * columns), y(batch * rows + 1);
        for (auto& one : x) narrow(uniform(numbers), one);
        narrow(123, y[batch * rows]);
        bitmask_multiply(&m, x.data(), y.data(), batch, 1);
        if (wide(y[batch * rows]) != 123) return 4;
        for (int b = 0; b < batch; ++b)
            for (int64_t row = 0; row < rows; ++row) {
                double sum = wide(bias[row]), size = std::abs(sum);
                for (int64_t c = 0; c < columns; ++c) {
                    double product = double(wide(weight[row * columns + c])) * wide(x[b * columns + c]);
                    sum += product, size += std::abs(product);
                }
                double epsilon = type == FLOAT32 ? 0 : type == BFLOAT16 ? 0x1p-8 : 0x1p-11;
                if (!(std::abs(wide(y[b * rows + row]) - sum) <= epsilon * std::abs(sum) + 1e-6 * size)) return 5;
            }
    }
    return 0;
}

int check_types() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every float16, there and back; every bfloat16, too
        float16 h{uint16_t(bits)}, h2;
        bfloat16 b{uint16_t(bits)}, b2;
        narrow(wide(h), h2), narrow(wide(b), b2);
        if (wide(h) == wide(h) ? h2.bits != bits : wide(h2) == wide(h2)) return 6;
        if (wide(b) == wide(b) ? b2.bits != bits : wide(b2) == wide(b2)) return 7;
    }
    return 0;
}

}  // namespace

int main() {
    int paths = bitmask_start(nullptr, nullptr, nullptr), failed = check_types();
    const char* names[PATHS] = {"plain", "avx2", "avx512", "avx512_bf16", "neon"};
    const int64_t shapes[][2] = {{1, 1}, {3, 7}, {5, 64}, {4, 65}, {17, 127}, {9, 200}, {33, 1000}};
    for (int path = 0; path < PATHS && !failed; ++path) {
        if (!(paths >> path & 1)) continue;
        for (auto& shape : shapes)
            for (double kept : {0.0, 0.1, 0.5, 1.0})
                for (bool dense : {false, true}) {
                    int64_t rows = shape[0], columns = dense ? (shape[1] + WORD - 1) / WORD * WORD : shape[1];
                    if (!failed) failed = check<float>(FLOAT32, path, rows, columns, kept, dense);
                    if (!failed) failed = check<bfloat16>(BFLOAT16, path, rows, columns, kept, dense);
                    if (!failed) failed = check<float16>(FLOAT16, path, rows, columns, kept, dense);
                    if (failed) return std::printf("%s %ld x %ld: check %d failed\n", names[path], long(rows), long(columns), failed), 1;
                }
        std::printf("%s\n", names[path]);
    }
    return failed != 0;
}

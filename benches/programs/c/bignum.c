// Arithmetic on numbers of many digits, each result a small block that lives for a moment: digits of e by a
// spigot over heap-allocated limbs.
#include "bench.h"

typedef struct {
    int len;
    uint32_t limbs[];
} big;

static big *make(int len) {
    big *n = must(malloc(sizeof(big) + 4 * (size_t)len));
    n->len = len;
    return n;
}

static big *add(const big *a, const big *b) {
    int len = a->len > b->len ? a->len : b->len;
    big *sum = make(len + 1);
    uint64_t carry = 0;
    for (int i = 0; i < len; i++) {
        carry += (i < a->len ? a->limbs[i] : 0) + (uint64_t)(i < b->len ? b->limbs[i] : 0);
        sum->limbs[i] = (uint32_t)carry;
        carry >>= 32;
    }
    sum->limbs[len] = (uint32_t)carry;
    if (!carry) sum->len = len;
    return sum;
}

static big *times(const big *a, uint32_t by) {
    big *product = make(a->len + 1);
    uint64_t carry = 0;
    for (int i = 0; i < a->len; i++) {
        carry += (uint64_t)a->limbs[i] * by;
        product->limbs[i] = (uint32_t)carry;
        carry >>= 32;
    }
    product->limbs[a->len] = (uint32_t)carry;
    if (!carry) product->len = a->len;
    return product;
}

static uint32_t remainder_by(const big *a, uint32_t by) {
    uint64_t rest = 0;
    for (int i = a->len - 1; i >= 0; i--) rest = ((rest << 32) | a->limbs[i]) % by;
    return (uint32_t)rest;
}

int main(int argc, char **argv) {
    int rounds = argument(argc, argv, 26000);
    uint32_t check = 0;
    for (int round = 0; round < rounds; round++) {
        // Convergents of a continued fraction, p(k) = a p(k-1) + p(k-2).
        big *older = make(1), *newer = make(1);
        older->limbs[0] = 1;
        newer->limbs[0] = 2 + (uint32_t)round;
        for (int k = 1; k < 150; k++) {
            big *scaled = times(newer, (uint32_t)(k % 3 == 2 ? 2 * (k / 3 + 1) : 1));
            big *sum = add(scaled, older);
            free(scaled);
            free(older);
            older = newer;
            newer = sum;
        }
        check = check * 31 + remainder_by(newer, 1000003);
        free(older);
        free(newer);
    }
    printf("%u\n", check);
}

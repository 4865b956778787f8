// What a C++ program may expect of operator new and delete. Says "all is well" and nothing else.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

static int calls = 0;

static void handler() {
    if (++calls == 3) std::set_new_handler(nullptr);
}

static void expect(bool holds, const char* what) {
    if (!holds) {
        std::printf("not so: %s\n", what);
        std::exit(1);
    }
}

struct alignas(128) Wide {
    char bytes[300];
};

int main() {
    volatile std::size_t absurd = SIZE_MAX / 4;
    for (int round = 0; round < 2; round++) {
        bool caught = false;
        try {
            delete[] new char[absurd];
        } catch (const std::bad_alloc&) {
            caught = true;
        }
        expect(caught, "new throws");
        caught = false;
        try {
            operator delete(operator new(absurd, std::align_val_t(64)), std::align_val_t(64));
        } catch (const std::bad_alloc&) {
            caught = true;
        }
        expect(caught, "aligned new throws");
        expect(new (std::nothrow) char[absurd] == nullptr, "new returns null where asked to");
    }
    std::set_new_handler(handler);
    try {
        operator delete(operator new(absurd));
        expect(false, "new throws after the handler gave up");
    } catch (const std::bad_alloc&) {
    }
    expect(calls == 3, "the handler is called as often as it wants");

    std::vector<std::unique_ptr<Wide>> wide;
    for (int i = 0; i < 100; i++) {
        wide.push_back(std::make_unique<Wide>());
        expect(reinterpret_cast<std::uintptr_t>(wide.back().get()) % 128 == 0, "alignment");
    }
    std::string text;
    std::thread other([&] {
        for (int i = 0; i < 10000; i++) text += std::to_string(i);
        wide.clear();
    });
    other.join();
    expect(text.size() == 38890, "strings grow");
    std::puts("all is well");
}

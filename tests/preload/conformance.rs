//! What `malloc` and its kin promise.

use std::ffi::{CStr, c_int, c_void};

type Block = *mut c_void;

macro_rules! surface {
    ($($field:ident: $name:literal fn($($argument:ty),*) $(-> $answer:ty)?;)*) => {
        /// The functions, under short names.
        #[derive(Clone, Copy)]
        pub struct Surface {
            $(pub $field: unsafe extern "C" fn($($argument),*) $(-> $answer)?,)*
        }

        impl Surface {
            /// Looks every function up.
            ///
            /// # Safety
            /// `find` returns functions of these names, which stay.
            pub unsafe fn new(find: impl Fn(&[u8]) -> Block) -> Self {
                // SAFETY: the names say what the types are.
                unsafe { Self { $($field: std::mem::transmute::<
                    Block,
                    unsafe extern "C" fn($($argument),*) $(-> $answer)?
                >(find(concat!($name, "\0").as_bytes())),)* } }
            }
        }
    };
}

surface! {
    malloc: "malloc" fn(usize) -> Block;
    calloc: "calloc" fn(usize, usize) -> Block;
    realloc: "realloc" fn(Block, usize) -> Block;
    reallocarray: "reallocarray" fn(Block, usize, usize) -> Block;
    free: "free" fn(Block);
    free_sized: "free_sized" fn(Block, usize);
    free_aligned_sized: "free_aligned_sized" fn(Block, usize, usize);
    memalign: "memalign" fn(usize, usize) -> Block;
    aligned_alloc: "aligned_alloc" fn(usize, usize) -> Block;
    posix_memalign: "posix_memalign" fn(*mut Block, usize, usize) -> c_int;
    valloc: "valloc" fn(usize) -> Block;
    pvalloc: "pvalloc" fn(usize) -> Block;
    usable: "malloc_usable_size" fn(Block) -> usize;
    trim: "malloc_trim" fn(usize) -> c_int;
    mallopt: "mallopt" fn(c_int, c_int) -> c_int;
    mallinfo2: "mallinfo2" fn() -> [usize; 10];
    mallinfo: "mallinfo" fn() -> [c_int; 10];
    malloc_info: "malloc_info" fn(c_int, *mut libc::FILE) -> c_int;
    cfree: "cfree" fn(Block);
    libc_malloc: "__libc_malloc" fn(usize) -> Block;
    libc_calloc: "__libc_calloc" fn(usize, usize) -> Block;
    libc_realloc: "__libc_realloc" fn(Block, usize) -> Block;
    libc_reallocarray: "__libc_reallocarray" fn(Block, usize, usize) -> Block;
    libc_free: "__libc_free" fn(Block);
    libc_memalign: "__libc_memalign" fn(usize, usize) -> Block;
    libc_posix_memalign: "__posix_memalign" fn(*mut Block, usize, usize) -> c_int;
    libc_valloc: "__libc_valloc" fn(usize) -> Block;
    libc_pvalloc: "__libc_pvalloc" fn(usize) -> Block;
    libc_mallopt: "__libc_mallopt" fn(c_int, c_int) -> c_int;
    libc_mallinfo: "__libc_mallinfo" fn() -> [c_int; 10];
    new: "_Znwm" fn(usize) -> Block;
    new_array: "_Znam" fn(usize) -> Block;
    new_nothrow: "_ZnwmRKSt9nothrow_t" fn(usize, *const u8) -> Block;
    new_array_nothrow: "_ZnamRKSt9nothrow_t" fn(usize, *const u8) -> Block;
    new_aligned: "_ZnwmSt11align_val_t" fn(usize, usize) -> Block;
    new_array_aligned: "_ZnamSt11align_val_t" fn(usize, usize) -> Block;
    new_aligned_nothrow: "_ZnwmSt11align_val_tRKSt9nothrow_t" fn(usize, usize, *const u8) -> Block;
    new_array_aligned_nothrow: "_ZnamSt11align_val_tRKSt9nothrow_t" fn(usize, usize, *const u8) -> Block;
    delete: "_ZdlPv" fn(Block);
    delete_array: "_ZdaPv" fn(Block);
    delete_sized: "_ZdlPvm" fn(Block, usize);
    delete_array_sized: "_ZdaPvm" fn(Block, usize);
    delete_aligned: "_ZdlPvSt11align_val_t" fn(Block, usize);
    delete_array_aligned: "_ZdaPvSt11align_val_t" fn(Block, usize);
    delete_sized_aligned: "_ZdlPvmSt11align_val_t" fn(Block, usize, usize);
    delete_array_sized_aligned: "_ZdaPvmSt11align_val_t" fn(Block, usize, usize);
    delete_nothrow: "_ZdlPvRKSt9nothrow_t" fn(Block, *const u8);
    delete_array_nothrow: "_ZdaPvRKSt9nothrow_t" fn(Block, *const u8);
    delete_aligned_nothrow: "_ZdlPvSt11align_val_tRKSt9nothrow_t" fn(Block, usize, *const u8);
    delete_array_aligned_nothrow: "_ZdaPvSt11align_val_tRKSt9nothrow_t" fn(Block, usize, *const u8);
}

impl Surface {
    /// Usable bytes of a block of `size`.
    pub fn usable_of(&self, size: usize) -> usize {
        // SAFETY: a live block.
        unsafe {
            let block = (self.malloc)(size);
            let usable = (self.usable)(block);
            (self.free)(block);
            usable
        }
    }
}

/// From none to several mappings.
const SIZES: [usize; 16] =
    [0, 1, 15, 16, 17, 100, 1000, 1024, 1025, 4096, 40_000, 65_536, 65_537, 700_000, 1 << 20, 9 << 20];
const ABSURD: [usize; 5] =
    [usize::MAX, usize::MAX - 15, isize::MAX as usize + 1, isize::MAX as usize, 1 << 47];

fn errno() -> c_int {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() }
}

fn set_errno(code: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = code }
}

/// Fails unless `call` returns null and leaves `code` in errno.
fn refused(what: &str, code: c_int, call: impl FnOnce() -> Block) {
    set_errno(0);
    assert!(call().is_null(), "{what}");
    assert_eq!(errno(), code, "{what}");
}

/// A block that is there, aligned, and the caller's to write to.
unsafe fn filled(surface: &Surface, block: Block, size: usize, align: usize, what: &str) -> Block {
    assert!(!block.is_null() && block.addr().is_multiple_of(align), "{what}({size}) gave {block:?}");
    // SAFETY: a live block of that size at least.
    unsafe {
        let usable = (surface.usable)(block);
        assert!(usable >= size, "{what}({size}) has {usable}");
        block.cast::<u8>().write_bytes(0xA5, usable);
    }
    block
}

/// Checks everything on one thread.
pub fn run(surface: &Surface) {
    // SAFETY: every block is live until freed once; errors are such that no block is touched.
    unsafe {
        plain_blocks(surface);
        zeroed_blocks(surface);
        resized_blocks(surface);
        aligned_blocks(surface);
        absurd_requests(surface);
        errno_of_success(surface);
        other_names(surface);
        operators(surface);
        questions(surface);
    }
}

unsafe fn plain_blocks(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        let blocks = SIZES.map(|size| filled(s, (s.malloc)(size), size, 16, "malloc"));
        for (at, block) in blocks.iter().enumerate() {
            assert!(!blocks[..at].contains(block), "two blocks of size 0 are two");
        }
        set_errno(77);
        for block in blocks {
            (s.free)(block);
        }
        (s.free)(std::ptr::null_mut());
        assert_eq!(errno(), 77, "free keeps errno");
        for size in SIZES {
            (s.free_sized)((s.malloc)(size), size);
            (s.free_aligned_sized)((s.aligned_alloc)(64, size), 64, size);
            // What glibc's names give, our free takes, and the other way about.
            (s.free)((s.libc_malloc)(size));
            (s.libc_free)((s.malloc)(size));
        }
    }
}

unsafe fn zeroed_blocks(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        for size in SIZES {
            for (count, each) in [(1, size), (size, 1)] {
                let block = (s.calloc)(count, each).cast::<u8>();
                let bytes = std::slice::from_raw_parts(block, size);
                assert!(bytes.iter().all(|byte| *byte == 0), "calloc({count}, {each})");
                (s.free)(filled(s, block.cast(), size, 16, "calloc"));
            }
        }
        assert!(!filled(s, (s.calloc)(0, usize::MAX), 0, 16, "calloc").is_null());
    }
}

unsafe fn resized_blocks(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        for from in SIZES {
            for to in SIZES.into_iter().filter(|to| *to > 0) {
                let block = filled(s, (s.malloc)(from), from, 16, "malloc");
                let moved = (s.realloc)(block, to).cast::<u8>();
                assert!(
                    !moved.is_null() && moved.addr().is_multiple_of(16) && (s.usable)(moved.cast()) >= to
                );
                let kept = std::slice::from_raw_parts(moved, from.min(to));
                assert!(kept.iter().all(|byte| *byte == 0xA5), "realloc from {from} to {to}");
                (s.free)(filled(s, moved.cast(), to, 16, "realloc"));
            }
        }
        let block = filled(s, (s.realloc)(std::ptr::null_mut(), 50), 50, 16, "realloc");
        assert!((s.realloc)(block, 0).is_null(), "realloc to 0 frees");
        (s.free)(filled(s, (s.realloc)(std::ptr::null_mut(), 0), 0, 16, "realloc"));
        let block = filled(s, (s.reallocarray)(std::ptr::null_mut(), 10, 100), 1000, 16, "reallocarray");
        // Refused, the block is as it was.
        refused("reallocarray", libc::ENOMEM, || (s.reallocarray)(block, 1 << 33, 1 << 33));
        for size in ABSURD {
            refused("realloc", libc::ENOMEM, || (s.realloc)(block, size));
        }
        assert_eq!(*block.cast::<u8>().add(999), 0xA5);
        (s.free)(block);
        let large = filled(s, (s.malloc)(9 << 20), 9 << 20, 16, "malloc");
        refused("realloc", libc::ENOMEM, || (s.realloc)(large, 1 << 47));
        assert_eq!(*large.cast::<u8>().add((9 << 20) - 1), 0xA5);
        (s.free)(large);
    }
}

unsafe fn aligned_blocks(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        for align in [8usize, 16, 32, 64, 256, 4096, 1 << 16, 1 << 17, 2 << 20, 8 << 20] {
            for size in SIZES {
                (s.free)(filled(s, (s.memalign)(align, size), size, align, "memalign"));
                (s.free)(filled(s, (s.aligned_alloc)(align, size), size, align, "aligned_alloc"));
                let mut block = std::ptr::null_mut();
                assert_eq!((s.posix_memalign)(&raw mut block, align, size), 0);
                let block = filled(s, block, size, align, "posix_memalign");
                let block = filled(s, (s.realloc)(block, size + 100), size + 100, 16, "realloc");
                (s.free)(block);
            }
        }
        for size in SIZES {
            (s.free)(filled(s, (s.valloc)(size), size, page, "valloc"));
            (s.free)(filled(s, (s.pvalloc)(size), size.max(1).next_multiple_of(page), page, "pvalloc"));
        }
        // An odd alignment is rounded up by memalign and refused by the others.
        (s.free)(filled(s, (s.memalign)(48, 100), 100, 64, "memalign"));
        (s.free)(filled(s, (s.memalign)(0, 100), 100, 16, "memalign"));
        refused("aligned_alloc", libc::EINVAL, || (s.aligned_alloc)(48, 96));
        refused("aligned_alloc", libc::EINVAL, || (s.aligned_alloc)(0, 96));
        refused("memalign", libc::EINVAL, || (s.memalign)(usize::MAX, 10));
        let untouched = std::ptr::without_provenance_mut(7);
        for (align, size, code) in [
            (0, 8, libc::EINVAL),
            (4, 8, libc::EINVAL),
            (24, 8, libc::EINVAL),
            (16, usize::MAX, libc::ENOMEM),
        ] {
            let mut block = untouched;
            set_errno(5);
            assert_eq!((s.posix_memalign)(&raw mut block, align, size), code, "{align} {size}");
            assert_eq!((block, errno()), (untouched, 5), "posix_memalign touches neither");
        }
    }
}

unsafe fn absurd_requests(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        for size in ABSURD {
            refused("malloc", libc::ENOMEM, || (s.malloc)(size));
            refused("calloc", libc::ENOMEM, || (s.calloc)(1, size));
            refused("memalign", libc::ENOMEM, || (s.memalign)(64, size));
            refused("memalign", libc::ENOMEM, || (s.memalign)(1 << 40, size));
            refused("aligned_alloc", libc::ENOMEM, || (s.aligned_alloc)(4096, size));
            refused("valloc", libc::ENOMEM, || (s.valloc)(size));
            refused("pvalloc", libc::ENOMEM, || (s.pvalloc)(size));
            assert!((s.new_nothrow)(size, std::ptr::null()).is_null());
            assert!((s.new_aligned_nothrow)(size, 64, std::ptr::null()).is_null());
        }
        refused("calloc", libc::ENOMEM, || (s.calloc)(usize::MAX / 2, 3));
        refused("calloc", libc::ENOMEM, || (s.calloc)(1 << 32, 1 << 32));
        refused("memalign", libc::ENOMEM, || (s.memalign)(1 << 63, 1));
    }
}

/// What succeeds leaves `errno`, also where the heap had to ask the system for memory.
unsafe fn errno_of_success(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        set_errno(77);
        let mut kept = Vec::new();
        for size in SIZES {
            for align in [16, 4096, 2 << 20] {
                let mut block = std::ptr::null_mut();
                (s.posix_memalign)(&raw mut block, align, size);
                kept.extend([
                    (s.malloc)(size),
                    (s.calloc)(size, 3),
                    (s.realloc)((s.malloc)(size), 2 * size + 1),
                    (s.reallocarray)(std::ptr::null_mut(), 3, size + 1),
                    (s.memalign)(align, size),
                    (s.aligned_alloc)(align, size),
                    (s.valloc)(size),
                    (s.pvalloc)(size),
                    (s.new)(size),
                    block,
                ]);
                assert_eq!(errno(), 77, "{size} bytes at {align}");
            }
        }
        assert!(kept.iter().all(|block| !block.is_null()));
        for block in kept {
            (s.free)(block);
            assert_eq!(errno(), 77, "free");
        }
        (s.trim)(0);
        (s.usable)(std::ptr::null_mut());
    }
}

/// The names by which glibc is meant are ours as well: blocks go in by one and out by another.
unsafe fn other_names(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        for size in SIZES {
            let zeroed = (s.libc_calloc)(1, size);
            let bytes = std::slice::from_raw_parts(zeroed.cast::<u8>(), size);
            assert!(bytes.iter().all(|byte| *byte == 0));
            (s.cfree)(filled(s, (s.libc_realloc)(zeroed, size + 1), size + 1, 16, "__libc_realloc"));
            let array = (s.libc_reallocarray)(std::ptr::null_mut(), size, 1);
            (s.free)(filled(s, array, size, 16, "__libc_reallocarray"));
            (s.free)(filled(s, (s.libc_memalign)(64, size), size, 64, "__libc_memalign"));
            (s.free)(filled(s, (s.libc_valloc)(size), size, page, "__libc_valloc"));
            (s.free)(filled(s, (s.libc_pvalloc)(size), size, page, "__libc_pvalloc"));
            let mut block = std::ptr::null_mut();
            assert_eq!((s.libc_posix_memalign)(&raw mut block, 32, size), 0);
            (s.libc_free)(filled(s, block, size, 32, "__posix_memalign"));
        }
        refused("__libc_calloc", libc::ENOMEM, || (s.libc_calloc)(usize::MAX, 2));
        let block = (s.malloc)(10);
        refused("__libc_reallocarray", libc::ENOMEM, || (s.libc_reallocarray)(block, usize::MAX, 2));
        (s.free)(block);
        assert_eq!([(s.libc_mallopt)(-3, 1 << 20), (s.libc_mallopt)(12_345, 1)], [1, 0]);
        let large = (s.malloc)(40 << 20);
        assert!((s.libc_mallinfo)()[4] >= 40 << 20);
        (s.free)(large);
    }
}

unsafe fn operators(s: &Surface) {
    let nothrow = 0u8;
    let tag = &raw const nothrow;
    // SAFETY: see `run`.
    unsafe {
        for size in SIZES {
            let made = |block, align| filled(s, block, size, align, "new");
            (s.delete)(made((s.new)(size), 16));
            (s.delete_array)(made((s.new_array)(size), 16));
            (s.delete_sized)(made((s.new_nothrow)(size, tag), 16), size);
            (s.delete_array_sized)(made((s.new_array_nothrow)(size, tag), 16), size);
            (s.delete_aligned)(made((s.new_aligned)(size, 128), 128), 128);
            (s.delete_array_aligned)(made((s.new_array_aligned)(size, 128), 128), 128);
            (s.delete_sized_aligned)(made((s.new_aligned_nothrow)(size, 64, tag), 64), size, 64);
            (s.delete_array_sized_aligned)(made((s.new_array_aligned_nothrow)(size, 64, tag), 64), size, 64);
            (s.delete_nothrow)(made((s.new)(size), 16), tag);
            (s.delete_array_nothrow)(made((s.new)(size), 16), tag);
            (s.delete_aligned_nothrow)(made((s.new_aligned)(size, 32), 32), 32, tag);
            (s.delete_array_aligned_nothrow)(made((s.new_aligned)(size, 32), 32), 32, tag);
        }
        (s.delete)(std::ptr::null_mut());
        (s.delete_sized)(std::ptr::null_mut(), 8);
    }
}

unsafe fn questions(s: &Surface) {
    // SAFETY: see `run`.
    unsafe {
        assert_eq!((s.usable)(std::ptr::null_mut()), 0);
        let blocks: Vec<Block> = (0..2000).map(|_| (s.malloc)(5000)).collect();
        let large = (s.malloc)(50 << 20);
        // Other threads may be at work: what they hold comes on top.
        let [arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost] =
            (s.mallinfo2)();
        assert!(uordblks >= 59 << 20 && hblkhd >= 50 << 20 && arena > 9 << 20, "{uordblks} {hblkhd} {arena}");
        assert!((s.mallinfo)()[4] >= 50 << 20);
        // Live or not is all there is; what only means something of glibc's own lists is zero.
        assert!(arena + hblkhd <= uordblks + fordblks + (1 << 20), "{arena} {hblkhd} {uordblks} {fordblks}");
        assert_eq!([ordblks, smblks, hblks, usmblks, fsmblks, keepcost], [0; 6]);
        (s.free)(large);
        blocks.into_iter().for_each(|block| (s.free)(block));
        (s.trim)(0);
        // M_MMAP_THRESHOLD is taken, M_PERTURB and what nobody knows is not.
        assert_eq!([(s.mallopt)(-3, 1 << 20), (s.mallopt)(-6, 1), (s.mallopt)(12_345, 1)], [1, 0, 0]);
        let mut text: *mut libc::c_char = std::ptr::null_mut();
        let mut len = 0;
        let stream = libc::open_memstream(&raw mut text, &raw mut len);
        assert_eq!(((s.malloc_info)(0, stream), (s.malloc_info)(1, stream)), (0, -1));
        libc::fclose(stream);
        let xml = CStr::from_ptr(text).to_string_lossy().into_owned();
        assert!(xml.starts_with("<malloc version=\"1\">") && xml.trim_end().ends_with("</malloc>"), "{xml}");
        libc::free(text.cast());
    }
}

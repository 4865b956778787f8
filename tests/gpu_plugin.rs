//! The plugin's C interface, loaded as a program loads it: `examples/gpu_plugin` over simulated devices.
//!
//! The library reads its environment once, so each scene runs in a process of its own: the test starts this program
//! again with the scene's name and variables, and the scene loads the library.

#![cfg(all(unix, feature = "cuda"))]

mod children;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr::null_mut;
use std::sync::{Once, OnceLock};
use std::time::SystemTime;

use libloading::Library;

type Ptr = *mut c_void;

/// Declares the table of the library's functions.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($arg:ty),*) $(-> $result:ty)?;)*) => {
        struct Api { $($field: unsafe extern "C" fn($($arg),*) $(-> $result)?,)* }

        impl Api {
            fn find(library: &'static Library) -> Self {
                Self {
                    $($field: {
                        let name = concat!(stringify!($symbol), "\0");
                        // SAFETY: the signatures are those of the plugin's documentation.
                        *unsafe { library.get::<unsafe extern "C" fn($($arg),*) $(-> $result)?>(name.as_bytes()) }.unwrap()
                    },)*
                }
            }
        }
    };
}

functions! {
    alloc = memory_pool_torch_alloc(isize, c_int, Ptr) -> Ptr;
    free = memory_pool_torch_free(Ptr, isize, c_int, Ptr);
    record_stream = memory_pool_torch_record_stream(Ptr, Ptr);
    empty_cache = memory_pool_torch_empty_cache();
    memory_fraction = memory_pool_torch_memory_fraction(f64, c_int);
    init = memory_pool_torch_init(c_int);
    begin_pool = memory_pool_torch_begin_pool(c_int, u64, u64, Ptr);
    end_pool = memory_pool_torch_end_pool(c_int, u64, u64);
    release_pool = memory_pool_torch_release_pool(c_int, u64, u64);
    cupy_malloc = memory_pool_cupy_malloc(Ptr, usize, c_int) -> Ptr;
    cupy_free = memory_pool_cupy_free(Ptr, Ptr, c_int);
    rmm_allocate = memory_pool_rmm_allocate(usize, Ptr, Ptr) -> Ptr;
    rmm_deallocate = memory_pool_rmm_deallocate(Ptr, usize, Ptr, Ptr);
    stats = memory_pool_gpu_stats(c_int, Ptr, usize) -> c_int;
    stats_json = memory_pool_gpu_stats_json(c_int, *mut c_char, usize) -> isize;
    reset_peak = memory_pool_gpu_reset_peak(c_int) -> c_int;
    trim = memory_pool_gpu_trim(c_int) -> isize;
    check = memory_pool_gpu_check(c_int) -> c_int;
    stream_ends = memory_pool_stream_ends(c_int, Ptr) -> c_int;
    last_error = memory_pool_last_error() -> *const c_char;
    sim_stream = memory_pool_sim_stream_create(c_int) -> Ptr;
    sim_destroy = memory_pool_sim_stream_destroy(Ptr) -> c_int;
    sim_fill = memory_pool_sim_fill(c_int, Ptr, Ptr, usize, u8) -> c_int;
    sim_expect = memory_pool_sim_expect(c_int, Ptr, Ptr, usize, u8) -> c_int;
    sim_copy = memory_pool_sim_copy(c_int, Ptr, Ptr, Ptr, usize) -> c_int;
    sim_begin_capture = memory_pool_sim_begin_capture(Ptr) -> c_int;
    sim_end_capture = memory_pool_sim_end_capture(Ptr) -> Ptr;
    sim_launch = memory_pool_sim_launch(Ptr, Ptr) -> c_int;
    sim_sync = memory_pool_sim_synchronize(c_int) -> c_int;
    sim_mistakes = memory_pool_sim_mistakes() -> i64;
    sim_calls = memory_pool_sim_calls(*const c_char) -> u64;
}

/// `GpuPoolStats`, as a C program declares it.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Stats {
    allocated: u64,
    peak_allocated: u64,
    reserved: u64,
    peak_reserved: u64,
    allocations: u64,
    frees: u64,
    failures: u64,
    driver_calls: u64,
    metadata: u64,
    largest_free: u64,
    limit: u64,
    total_memory: u64,
}

/// When a file, or the youngest one of a folder, was changed.
fn changed(path: &Path) -> SystemTime {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let newest = entries.map(|entry| changed(&entry.path())).max();
    newest.unwrap_or_else(|| std::fs::metadata(path).unwrap().modified().unwrap())
}

/// The library beside this program's own folder, where `cargo test` puts it. It is built here where only this test was
/// asked for and it is missing or old.
fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let profile = own.parent().unwrap().parent().unwrap().to_path_buf();
    let path = profile.join("examples").join("libgpu_plugin.so");
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let newest = changed(&home.join("src")).max(changed(&home.join("examples/gpu_plugin")));
    if std::env::var_os(SCENE).is_none() && (!path.exists() || changed(&path) < newest) {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--example", "gpu_plugin"]).current_dir(home);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let Output { status, stderr, .. } = children::output_of(&mut build).unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    }
    path
}

fn api() -> &'static Api {
    static API: OnceLock<Api> = OnceLock::new();
    API.get_or_init(|| {
        // SAFETY: our own library; its initialisers do nothing.
        let library = unsafe { Library::new(library()) }.unwrap();
        Api::find(Box::leak(Box::new(library)))
    })
}

/// What the thread's last failure says.
fn error() -> String {
    // SAFETY: never null, and copied at once.
    unsafe { CStr::from_ptr((api().last_error)()) }.to_string_lossy().into_owned()
}

fn stats(device: c_int) -> Stats {
    let mut stats = Stats::default();
    // SAFETY: the place is as large as stated.
    let code = unsafe { (api().stats)(device, (&raw mut stats).cast(), size_of::<Stats>()) };
    assert_eq!(code, 0, "{}", error());
    stats
}

fn calls(name: &CStr) -> u64 {
    // SAFETY: ends with a NUL.
    unsafe { (api().sim_calls)(name.as_ptr()) }
}

const SCENE: &str = "MEMORY_POOL_TEST_SCENE";

/// Plays a scene, which is named as its test, in a process with these variables.
fn scene(name: &str, variables: &[(&str, &str)], play: fn()) {
    if std::env::var(SCENE).is_ok_and(|scene| scene == name) {
        return play();
    }
    static BUILT: Once = Once::new();
    BUILT.call_once(|| drop(library()));
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(SCENE, name);
    child.envs(variables.iter().copied());
    let output = children::output_of(&mut child).unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "scene {name}:\n{text}");
}

const SIM: (&str, &str) = ("MEMORY_POOL_GPU_DRIVER", "sim");

#[test]
fn calls_that_make_no_sense_are_answered_with_null() {
    scene(
        "calls_that_make_no_sense_are_answered_with_null",
        &[SIM, ("MEMORY_POOL_GPU_SIM_DEVICES", "2")],
        || {
            let api = api();
            // SAFETY: what is passed is valid for its call, or wrong in a way that the call must detect.
            unsafe {
                (api.init)(2);
                assert!((api.alloc)(0, 0, null_mut()).is_null());
                (api.free)(null_mut(), 0, 0, null_mut());
                assert_eq!(error(), "", "a size of 0 and null are no failures");
                for device in [2, 63, 64, 1 << 20, -1, c_int::MIN] {
                    assert!((api.alloc)(512, device, null_mut()).is_null());
                    assert!(error().contains(&format!("device {device} is not there")), "{}", error());
                    let mut place = Stats::default();
                    assert_eq!((api.stats)(device, (&raw mut place).cast(), size_of::<Stats>()), -1);
                    assert_eq!((api.trim)(device), -1);
                }
                for bytes in [isize::MAX, isize::MIN, -1, 1 << 50] {
                    assert!((api.alloc)(bytes, 0, null_mut()).is_null(), "{bytes}");
                    assert!(error().starts_with("allocation for PyTorch: "), "{}", error());
                }
                let failures = stats(0).failures;
                assert_eq!(failures, 4);

                let block = (api.alloc)(1000, 0, null_mut());
                assert!(!block.is_null() && (block as usize).is_multiple_of(256));
                let foreign = (&raw const failures).cast_mut().cast::<c_void>();
                for (wrong, says) in
                    [(foreign, "not memory of this library"), (block.byte_add(256), "inside")]
                {
                    (api.free)(wrong, 1000, 0, null_mut());
                    assert!(error().contains(says), "{}", error());
                    (api.record_stream)(wrong, null_mut());
                    (api.cupy_free)(null_mut(), wrong, 0);
                    (api.rmm_deallocate)(wrong, 1000, null_mut(), null_mut());
                }
                // Of another device: refused, and live yet.
                let second = (api.alloc)(1000, 1, null_mut());
                (api.free)(second, 1000, 0, null_mut());
                assert!(error().contains("a block of device 1"), "{}", error());
                assert_eq!((stats(0).allocated, stats(1).allocated), (1024, 1024));
                (api.free)(second, 1000, 1, null_mut());
                (api.free)(block, 1000, 0, null_mut());
                // Twice.
                (api.free)(block, 1000, 0, null_mut());
                assert!(error().starts_with("free for PyTorch: "), "{}", error());
                assert!((api.rmm_allocate)(512, null_mut(), usize::MAX as Ptr).is_null());
                assert!(error().contains("no device number"), "{}", error());
                assert_eq!((api.stats)(0, null_mut(), 8), -1);
                (api.memory_fraction)(1.5, 0);
                assert!(error().contains("0.0 to 1.0"), "{}", error());
                (api.memory_fraction)(f64::NAN, 0);
                assert!(error().contains("NaN"), "{}", error());
                assert_eq!((api.stream_ends)(0, 0x1234 as Ptr), 0);
                for device in 0..2 {
                    assert_eq!((stats(device).allocated, (api.check)(device)), (0, 0));
                }
                assert_eq!((api.sim_mistakes)(), 0);
            }
        },
    );
}

#[test]
fn statistics_are_read_as_a_structure_and_as_json() {
    scene("statistics_are_read_as_a_structure_and_as_json", &[SIM], || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let blocks: Vec<Ptr> = (0..4).map(|_| (api.alloc)(1 << 20, 0, null_mut())).collect();
            blocks.iter().for_each(|&block| (api.free)(block, 1 << 20, 0, null_mut()));
            let kept = (api.alloc)(4096, 0, null_mut());
            let now = stats(0);
            assert_eq!((now.allocated, now.peak_allocated), (4096, 4 << 20));
            assert!(now.reserved >= 4 << 20 && now.peak_reserved >= now.reserved && now.driver_calls > 0);
            assert_eq!((now.allocations, now.frees, now.failures), (5, 4, 0));
            assert_eq!((now.limit, now.total_memory), (u64::MAX, 64 << 30));
            // A caller that knows the first two fields only.
            let mut two = [7u64; 3];
            assert_eq!((api.stats)(0, two.as_mut_ptr().cast(), 16), 0);
            assert_eq!(two, [4096, 4 << 20, 7]);
            // And one that knows more than there are.
            let mut many = [7u64; 64];
            assert_eq!((api.stats)(0, many.as_mut_ptr().cast(), size_of_val(&many)), 0);
            assert_eq!((many[0], many[63]), (4096, 7));

            let len = (api.stats_json)(0, null_mut(), 0);
            let mut text = vec![1 as c_char; len as usize + 2];
            assert_eq!((api.stats_json)(0, text.as_mut_ptr(), text.len()), len);
            let text = CStr::from_ptr(text.as_ptr()).to_str().unwrap();
            let json: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(json["allocated"], 4096);
            assert_eq!(json["peak_reserved"].as_u64(), Some(now.peak_reserved));
            assert_eq!(json.as_object().unwrap().len(), size_of::<Stats>() / 8);
            let mut short = [1 as c_char; 6];
            assert_eq!((api.stats_json)(0, short.as_mut_ptr(), 5), len);
            assert_eq!(CStr::from_ptr(short.as_ptr()).to_bytes(), &text.as_bytes()[..4]);
            assert_eq!(short[5], 1, "nothing is written past the end");

            assert_eq!((api.reset_peak)(0), 0);
            assert_eq!(stats(0).peak_allocated, 4096);
            (api.free)(kept, 4096, 0, null_mut());
            (api.empty_cache)();
            assert_eq!((stats(0).reserved, (api.trim)(0)), (0, 0));
        }
    });
}

#[test]
fn memory_that_runs_out_is_null_and_no_more() {
    let variables = [SIM, ("MEMORY_POOL_GPU_SIM_MEMORY", "268435456")];
    scene("memory_that_runs_out_is_null_and_no_more", &variables, || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let (a, b) = ((api.sim_stream)(0), (api.sim_stream)(0));
            let mut held = Vec::new();
            loop {
                let block = (api.alloc)(16 << 20, 0, a);
                if block.is_null() {
                    break;
                }
                assert_eq!((api.sim_fill)(0, a, block, 4096, 1), 0);
                held.push(block);
            }
            assert_eq!(held.len(), 16);
            assert!(error().contains("memory"), "{}", error());
            // What is freed serves other streams, and in other sizes, though its work is in flight.
            held.drain(4..12).for_each(|block| (api.free)(block, 16 << 20, 0, a));
            let large = (api.alloc)(100 << 20, 0, b);
            assert!(!large.is_null(), "{}", error());
            assert_eq!((api.sim_fill)(0, b, large.byte_add(50 << 20), 4096, 2), 0);
            (api.free)(large, 100 << 20, 0, b);
            held.drain(..).for_each(|block| (api.free)(block, 16 << 20, 0, a));
            (api.sim_sync)(0);
            (api.empty_cache)();
            assert_eq!(stats(0).reserved, 0);
            // A fraction of the device.
            (api.memory_fraction)(0.25, 0);
            assert_eq!(stats(0).limit, 64 << 20);
            let most = (api.alloc)(60 << 20, 0, a);
            assert!(!most.is_null() && (api.alloc)(60 << 20, 0, a).is_null());
            (api.memory_fraction)(1.0, 0);
            let more = (api.alloc)(60 << 20, 0, a);
            assert!(!more.is_null(), "{}", error());
            (api.free)(most, 0, 0, a);
            (api.free)(more, 0, 0, a);
            assert_eq!(((api.check)(0), (api.sim_mistakes)(), stats(0).allocated), (0, 0, 0));
        }
    });
}

/// A thread's work: blocks of many sizes on streams in turn, filled, checked, some recorded elsewhere.
fn work(thread: usize, streams: &[usize]) {
    let api = api();
    let mut seed = thread as u64 * 77 + 1;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    };
    let mut live: Vec<(Ptr, usize, usize, u8)> = Vec::new();
    for step in 0..300 {
        if live.len() < 8 && random(3) != 0 {
            let scale = random(12);
            let (bytes, stream) = (1 + random(64 << scale), streams[random(streams.len())]);
            // SAFETY: streams exist until the scene ends.
            let block = unsafe { (api.rmm_allocate)(bytes, stream as Ptr, null_mut()) };
            assert!(!block.is_null(), "{}", error());
            let byte = (thread * 31 + step) as u8;
            // SAFETY: as above.
            assert_eq!(unsafe { (api.sim_fill)(0, stream as Ptr, block, bytes, byte) }, 0);
            live.push((block, bytes, stream, byte));
        } else if !live.is_empty() {
            let (block, bytes, stream, byte) = live.swap_remove(random(live.len()));
            // SAFETY: live, freed once, on the stream of its work.
            unsafe {
                assert_eq!((api.sim_expect)(0, stream as Ptr, block, bytes, byte), 0);
                if random(4) == 0 {
                    (api.record_stream)(block, streams[random(streams.len())] as Ptr);
                }
                (api.rmm_deallocate)(block, bytes, stream as Ptr, null_mut());
            }
        }
    }
    for (block, bytes, stream, _) in live {
        // SAFETY: as above.
        unsafe { (api.rmm_deallocate)(block, bytes, stream as Ptr, null_mut()) };
    }
}

#[test]
fn threads_and_streams_share_a_pool() {
    scene("threads_and_streams_share_a_pool", &[SIM], || {
        let api = api();
        // SAFETY: device 0 is simulated.
        let streams: Vec<usize> = (0..12).map(|_| unsafe { (api.sim_stream)(0) } as usize).collect();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let streams = &streams;
                scope.spawn(move || work(thread, streams));
            }
        });
        // SAFETY: as above.
        unsafe {
            assert_eq!(((api.sim_sync)(0), (api.check)(0), (api.sim_mistakes)()), (0, 0, 0));
            assert_eq!(stats(0).allocated, 0);
            assert!(stats(0).allocations > 600);
        }
    });
}

#[test]
fn a_recorded_stream_is_waited_for_and_a_pair_asks_the_driver_for_nothing() {
    const NAME: &str = "a_recorded_stream_is_waited_for_and_a_pair_asks_the_driver_for_nothing";
    scene(NAME, &[SIM], || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let (a, b) = ((api.sim_stream)(0), (api.sim_stream)(0));
            for round in 0..50u8 {
                let block = (api.alloc)(4096, 0, a);
                assert_eq!((api.sim_fill)(0, a, block, 4096, round), 0);
                assert_eq!((api.sim_sync)(0), 0);
                // Read on b, freed on a: b must be waited for before a's next block overwrites it.
                (api.record_stream)(block, b);
                assert_eq!((api.sim_expect)(0, b, block, 4096, round), 0);
                (api.free)(block, 4096, 0, a);
                let next = (api.alloc)(4096, 0, a);
                assert_eq!((api.sim_fill)(0, a, next, 4096, 255), 0);
                (api.free)(next, 4096, 0, a);
            }
            assert_eq!(((api.sim_sync)(0), (api.sim_mistakes)()), (0, 0));
            const CALLS: [&CStr; 4] =
                [c"cuEventRecord", c"cuStreamWaitEvent", c"cuEventQuery", c"cuMemCreate"];
            for _ in 0..100 {
                let block = (api.alloc)(1 << 20, 0, a);
                (api.free)(block, 1 << 20, 0, a);
            }
            // The first of them may have had to grow or to look.
            let between =
                [c"cuEventRecord", c"cuStreamWaitEvent", c"cuEventQuery", c"cuMemCreate"].map(calls);
            for _ in 0..100 {
                let block = (api.alloc)(1 << 20, 0, a);
                (api.free)(block, 1 << 20, 0, a);
            }
            let after = CALLS.map(calls);
            assert_eq!(between, after);
        }
    });
}

#[test]
fn cupy_without_a_stream_gets_memory_that_nothing_is_at_work_on() {
    scene("cupy_without_a_stream_gets_memory_that_nothing_is_at_work_on", &[SIM], || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let streams = [(); 3].map(|()| (api.sim_stream)(0));
            let waits = calls(c"cuCtxSynchronize");
            for round in 0..30 {
                let stream = streams[round % 3];
                let blocks: Vec<Ptr> = (0..4).map(|_| (api.cupy_malloc)(null_mut(), 1 << 20, 0)).collect();
                for &block in &blocks {
                    assert!(!block.is_null(), "{}", error());
                    assert_eq!((api.sim_fill)(0, stream, block, 1 << 12, round as u8), 0);
                    assert_eq!((api.sim_expect)(0, stream, block, 1 << 12, round as u8), 0);
                }
                blocks.iter().for_each(|&block| (api.cupy_free)(null_mut(), block, 0));
                // Given back, not yet free: a second time is noticed at once.
                (api.cupy_free)(null_mut(), blocks[0], 0);
                assert!(error().contains("no live block"), "{}", error());
            }
            assert_eq!(((api.sim_sync)(0), (api.sim_mistakes)()), (0, 0));
            assert!(stats(0).peak_reserved <= 16 << 20, "{}", stats(0).peak_reserved);
            let waited = calls(c"cuCtxSynchronize") - waits;
            assert!(waited <= 31, "{waited} waits for 120 frees");
            assert!((api.trim)(0) > 0 && stats(0).allocated == 0);
            // With a stream named, no wait at all.
            let waits = calls(c"cuCtxSynchronize");
            for _ in 0..60 {
                let block = (api.cupy_malloc)(streams[0], 1 << 20, 0);
                assert_eq!((api.sim_fill)(0, streams[0], block, 1 << 12, 3), 0);
                (api.cupy_free)(streams[0], block, 0);
            }
            assert_eq!((calls(c"cuCtxSynchronize"), (api.sim_mistakes)()), (waits, 0));
        }
    });
}

#[test]
fn a_stream_may_end_while_its_blocks_are_out() {
    scene("a_stream_may_end_while_its_blocks_are_out", &[SIM], || {
        let api = api();
        // SAFETY: as above; a stream is ended before it is destroyed.
        unsafe {
            let stays = (api.sim_stream)(0);
            for round in 0..40u8 {
                let stream = (api.sim_stream)(0);
                let (block, kept) = ((api.alloc)(1 << 20, 0, stream), (api.alloc)(1 << 20, 0, stream));
                assert_eq!((api.sim_fill)(0, stream, block, 1 << 12, round), 0);
                assert_eq!((api.sim_fill)(0, stream, kept, 1 << 12, round), 0);
                (api.free)(block, 1 << 20, 0, stream);
                assert_eq!((api.stream_ends)(0, stream), 1);
                assert_eq!((api.sim_destroy)(stream), 0);
                let next = (api.alloc)(1 << 20, 0, stays);
                assert_eq!((api.sim_fill)(0, stays, next, 1 << 12, 0), 0);
                (api.free)(next, 1 << 20, 0, stays);
                (api.sim_sync)(0);
                (api.free)(kept, 1 << 20, 0, stays);
            }
            assert_eq!(((api.check)(0), (api.sim_mistakes)(), stats(0).allocated), (0, 0, 0));
        }
    });
}

#[test]
fn a_graph_has_memory_of_its_own() {
    scene("a_graph_has_memory_of_its_own", &[SIM], || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let (a, b) = ((api.sim_stream)(0), (api.sim_stream)(0));
            // Without a word from the framework each graph has memory of its own.
            assert_eq!((api.sim_begin_capture)(a), 0);
            let unsaid = (api.alloc)(4096, 0, a);
            assert!(!unsaid.is_null(), "{}", error());
            assert_eq!((api.sim_fill)(0, a, unsaid, 4096, 3), 0);
            (api.free)(unsaid, 4096, 0, a);
            let silent = (api.sim_end_capture)(a);
            assert!(!silent.is_null(), "{}", error());
            let meets = (api.alloc)(4096, 0, a);
            assert_ne!(meets, unsaid, "the graph's memory is handed out");
            assert_eq!((api.sim_fill)(0, a, meets, 4096, 4), 0);
            assert_eq!((api.sim_launch)(silent, b), 0);
            assert_eq!((api.sim_expect)(0, a, meets, 4096, 4), 0);
            (api.free)(meets, 4096, 0, a);

            (api.begin_pool)(0, 5, 0, null_mut());
            assert_eq!((api.sim_begin_capture)(a), 0);
            let eager = (api.alloc)(4096, 0, b);
            let first = (api.alloc)(1 << 20, 0, a);
            assert!(!first.is_null(), "{}", error());
            assert_eq!((api.sim_fill)(0, a, first, 1 << 12, 9), 0);
            assert_eq!((api.sim_expect)(0, a, first, 1 << 12, 9), 0);
            (api.free)(first, 1 << 20, 0, a);
            let output = (api.alloc)(1 << 20, 0, a);
            assert_eq!(output, first, "reused in the order of the capture");
            assert_eq!((api.sim_fill)(0, a, output, 1 << 12, 7), 0);
            let graph = (api.sim_end_capture)(a);
            (api.end_pool)(0, 5, 0);
            assert!(!graph.is_null(), "{}", error());
            assert_eq!(stats(0).allocated, 4096 + (1 << 20));
            // Others allocate and write while the graph is replayed: nobody meets its memory.
            for round in 0..20u8 {
                assert_eq!((api.sim_launch)(graph, a), 0);
                assert_eq!((api.sim_expect)(0, a, output, 1 << 12, 7), 0);
                let block = (api.alloc)(1 << 20, 0, b);
                assert_eq!((api.sim_fill)(0, b, block, 1 << 12, round), 0);
                (api.free)(block, 1 << 20, 0, b);
            }
            (api.sim_sync)(0);
            (api.free)(output, 1 << 20, 0, a);
            (api.release_pool)(0, 5, 0);
            // The graph's memory is everybody's again.
            let reserved = stats(0).reserved;
            let block = (api.alloc)(1 << 20, 0, b);
            assert_eq!((api.sim_fill)(0, b, block, 1 << 12, 1), 0);
            (api.free)(block, 1 << 20, 0, b);
            (api.free)(eager, 4096, 0, b);
            assert_eq!(((api.sim_sync)(0), (api.sim_mistakes)(), stats(0).reserved), (0, 0, reserved));
            assert_eq!(((api.check)(0), stats(0).allocated), (0, 0));
        }
    });
}

#[test]
fn two_devices_have_a_pool_each_and_reach_each_other() {
    let variables = [SIM, ("MEMORY_POOL_GPU_SIM_DEVICES", "2")];
    scene("two_devices_have_a_pool_each_and_reach_each_other", &variables, || {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let streams = [0, 1].map(|device| (api.sim_stream)(device));
            let blocks = [0, 1].map(|device| (api.alloc)(1 << 16, device as c_int, streams[device]));
            assert_eq!((api.sim_fill)(0, streams[0], blocks[0], 1 << 16, 42), 0);
            (api.sim_sync)(0);
            assert_eq!((api.sim_copy)(1, streams[1], blocks[1], blocks[0], 1 << 16), 0);
            assert_eq!((api.sim_expect)(1, streams[1], blocks[1], 1 << 16, 42), 0);
            (api.sim_sync)(1);
            for device in [0, 1] {
                (api.free)(blocks[device], 1 << 16, device as c_int, streams[device]);
                assert_eq!((stats(device as c_int).allocations, stats(device as c_int).allocated), (1, 0));
            }
            assert_eq!((api.sim_mistakes)(), 0);
        }
    });
}

#[test]
fn the_environment_configures_and_nonsense_in_it_is_named() {
    fn play() {
        let api = api();
        // SAFETY: as above.
        unsafe {
            let block = (api.alloc)(512, 0, null_mut());
            if std::env::var("MEMORY_POOL_GPU_MAX_SIZE").unwrap() == "lots" {
                assert!(block.is_null());
                assert!(
                    error().contains("MEMORY_POOL_GPU_MAX_SIZE") && error().contains("lots"),
                    "{}",
                    error()
                );
                return;
            }
            let blocks = [block, (api.alloc)(512, 0, null_mut())];
            assert!(blocks.iter().all(|&block| !block.is_null() && (block as usize).is_multiple_of(4096)));
            assert_eq!(stats(0).limit, 128 << 20);
            assert!((api.alloc)(129 << 20, 0, null_mut()).is_null());
            assert!(error().contains("max_size"), "{}", error());
        }
    }
    const NAME: &str = "the_environment_configures_and_nonsense_in_it_is_named";
    scene(NAME, &[SIM, ("MEMORY_POOL_GPU_MAX_SIZE", "lots")], play);
    scene(NAME, &[SIM, ("MEMORY_POOL_GPU_MAX_SIZE", "128M"), ("MEMORY_POOL_GPU_ALIGNMENT", "4096")], play);
}

#[test]
fn a_driver_that_is_not_there_is_null() {
    fn play() {
        let cards = memory_pool::GpuDevice::count() as c_int;
        // SAFETY: as above.
        unsafe {
            assert!((api().alloc)(512, cards, null_mut()).is_null());
            assert!(!error().is_empty());
            (api().free)(0x1000 as Ptr, 512, cards, null_mut());
            let mut place = Stats::default();
            assert_eq!((api().stats)(cards, (&raw mut place).cast(), size_of::<Stats>()), -1);
            assert!((api().sim_stream)(cards).is_null());
            if std::env::var("MEMORY_POOL_GPU_DRIVER").unwrap() == "rocm" {
                assert!(error().contains("rocm") && error().contains("cuda, sim"), "{}", error());
            }
        }
    }
    for driver in ["cuda", "rocm"] {
        scene("a_driver_that_is_not_there_is_null", &[("MEMORY_POOL_GPU_DRIVER", driver)], play);
    }
}

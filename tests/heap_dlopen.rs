//! The process heap inside a library that is loaded at run time, used by threads, and unloaded before they end.

mod children;
#[path = "programs/mod.rs"]
mod programs;

use std::sync::mpsc;

use libloading::os::unix::{Library, Symbol};

type Words = unsafe extern "C" fn(usize) -> usize;
type Open = unsafe extern "C" fn(usize) -> *mut u8;
type Close = unsafe extern "C" fn(*mut u8) -> usize;
type Owns = unsafe extern "C" fn(*const u8) -> bool;

struct Plugin {
    library: Library,
    words: Symbol<Words>,
    open: Symbol<Open>,
    close: Symbol<Close>,
    owns: Symbol<Owns>,
}

fn load() -> Plugin {
    let path = programs::example_library("heap_plugin");
    // SAFETY: the example's functions have these types, and its loading has no effect on others.
    unsafe {
        let library = Library::new(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Plugin {
            words: library.get(b"plugin_words\0").unwrap(),
            open: library.get(b"plugin_open\0").unwrap(),
            close: library.get(b"plugin_close\0").unwrap(),
            owns: library.get(b"plugin_owns\0").unwrap(),
            library,
        }
    }
}

/// Threads that used a plugin end after it is gone, again and again; the host forks meanwhile.
#[test]
fn threads_outlive_a_plugin() {
    for round in 0..10 {
        let plugin = load();
        let (go, gate) = mpsc::channel::<()>();
        let (done, reports) = mpsc::channel();
        let words = *plugin.words;
        // SAFETY: the library is loaded until the threads have reported.
        let expected = unsafe { words(300) };
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let done = done.clone();
                std::thread::spawn(move || {
                    // SAFETY: as above.
                    done.send(unsafe { words(300) }).unwrap();
                })
            })
            .collect();
        let waiting = std::thread::spawn(move || {
            // SAFETY: as above.
            done.send(unsafe { words(300) }).unwrap();
            gate.recv().unwrap();
        });
        assert!((0..4).all(|_| reports.recv().unwrap() == expected), "round {round}");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        plugin.library.close().unwrap();
        // Handlers around fork and at the end of threads are gone with it.
        // SAFETY: the child leaves at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child of round {round}");
        go.send(()).unwrap();
        waiting.join().unwrap();
    }
}

#[test]
fn what_one_thread_opens_another_closes() {
    let plugin = load();
    // SAFETY: each object is closed once, while the library is loaded.
    unsafe {
        let objects: Vec<usize> = (0..2000).map(|at| (plugin.open)(at * 7 % 5000) as usize).collect();
        assert!((plugin.owns)(objects[17] as *const u8) && !(plugin.owns)((&raw const plugin).cast()));
        let close = *plugin.close;
        let sum: usize = std::thread::spawn(move || objects.into_iter().map(|at| close(at as *mut u8)).sum())
            .join()
            .unwrap();
        assert_eq!(sum, (0..2000).map(|at| at * 7 % 5000).sum());
    }
}

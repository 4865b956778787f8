//! An export as bytes and descriptors on a Unix socket.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | the mark, which also names the format |
//! | 8 | number of handles |
//! | 8 | where the block begins in the first handle |
//! | 8 | bytes of the block |
//! | 8 each | bytes of the handles |
//!
//! all in the machine's own order, since descriptors do not leave it. Then come the descriptors, `BATCH` at most with
//! each further byte, which counts them.

use core::mem::{MaybeUninit, size_of};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::{Part, SharedExport};
use crate::base::error::{Error, Result};

const MARK: u64 = u64::from_ne_bytes(*b"mpshare1");
/// Descriptors in one message; the system takes 253.
const BATCH: usize = 64;
/// More handles than any block has.
const MOST: u64 = 1 << 16;

/// The buffer for descriptors, aligned as the system wants it.
#[repr(C, align(16))]
struct Ancillary([u8; 1024]);

const _: () = assert!(size_of::<Ancillary>() >= 64 + BATCH * size_of::<i32>());

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(call, &error)
}

fn foreign() -> Error {
    Error::refused("the message is no export of device memory", "send it with SharedExport::send")
}

pub(super) fn send(export: &SharedExport, mut to: &UnixStream) -> Result<()> {
    let head = [MARK, export.parts.len() as u64, export.offset as u64, export.bytes as u64];
    let lengths = export.parts.iter().map(|part| part.bytes as u64);
    let bytes: Vec<u8> = head.into_iter().chain(lengths).flat_map(u64::to_ne_bytes).collect();
    to.write_all(&bytes).map_err(io("send"))?;
    export.parts.chunks(BATCH).try_for_each(|parts| send_descriptors(parts, to))
}

fn send_descriptors(parts: &[Part], to: &UnixStream) -> Result<()> {
    let mut count = parts.len() as u8;
    let mut part = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 1 };
    let mut space = Ancillary([0; 1024]);
    let payload = parts.len() * size_of::<i32>();
    // SAFETY: the message names buffers that outlive the call; the header lies in `space`, which is large enough for
    // BATCH descriptors (asserted above), and each is written inside it.
    let sent = unsafe {
        let mut message: libc::msghdr = MaybeUninit::zeroed().assume_init();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = space.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(payload as u32) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(payload as u32) as _;
        let numbers = libc::CMSG_DATA(header).cast::<i32>();
        for (index, part) in parts.iter().enumerate() {
            numbers.add(index).write_unaligned(part.descriptor.as_raw_fd());
        }
        retried(|| libc::sendmsg(to.as_raw_fd(), &raw const message, 0))
    };
    if sent == 1 { Ok(()) } else { Err(io("sendmsg")(std::io::Error::last_os_error())) }
}

/// A call again and again while a signal interrupts it.
fn retried(call: impl Fn() -> isize) -> isize {
    loop {
        let result = call();
        if result >= 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return result;
        }
    }
}

pub(super) fn receive(mut from: &UnixStream) -> Result<SharedExport> {
    let mut word = || -> Result<u64> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes).map_err(io("receive"))?;
        Ok(u64::from_ne_bytes(bytes))
    };
    if word()? != MARK {
        return Err(foreign());
    }
    let (count, offset, bytes) = (word()?, word()?, word()?);
    if count > MOST {
        return Err(foreign());
    }
    let size = |length: u64| usize::try_from(length).map_err(|_| foreign());
    let lengths = (0..count).map(|_| size(word()?)).collect::<Result<Vec<_>>>()?;
    let mut descriptors = Vec::new();
    while descriptors.len() < lengths.len() {
        receive_descriptors(&mut descriptors, from)?;
    }
    if descriptors.len() != lengths.len() || lengths.contains(&0) {
        return Err(foreign());
    }
    let parts = descriptors.into_iter().zip(lengths);
    let parts = parts.map(|(descriptor, bytes)| Part { descriptor, bytes }).collect();
    Ok(SharedExport { parts, offset: size(offset)?, bytes: size(bytes)? })
}

/// Takes one message; its descriptors are in `into` even if it is refused, and so closed in the end.
fn receive_descriptors(into: &mut Vec<OwnedFd>, from: &UnixStream) -> Result<()> {
    let mut count = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 1 };
    let mut space = Ancillary([0; 1024]);
    let before = into.len();
    // SAFETY: the message names buffers that outlive the call; the system wrote the headers that are walked, inside
    // `space`, and each descriptor in them is new and ours.
    let cut = unsafe {
        let mut message: libc::msghdr = MaybeUninit::zeroed().assume_init();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = space.0.as_mut_ptr().cast();
        message.msg_controllen = space.0.len() as _;
        #[cfg(target_os = "linux")]
        let flags = libc::MSG_CMSG_CLOEXEC;
        #[cfg(not(target_os = "linux"))]
        let flags = 0;
        let message_at = &raw mut message;
        match retried(|| libc::recvmsg(from.as_raw_fd(), message_at, flags)) {
            1 => {}
            0 => return Err(io("receive")(std::io::ErrorKind::UnexpectedEof.into())),
            _ => return Err(io("recvmsg")(std::io::Error::last_os_error())),
        }
        let mut header = libc::CMSG_FIRSTHDR(message_at);
        while !header.is_null() {
            if ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let payload = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let numbers = libc::CMSG_DATA(header).cast::<i32>();
                for index in 0..payload / size_of::<i32>() {
                    into.push(OwnedFd::from_raw_fd(numbers.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message_at, header);
        }
        message.msg_flags & libc::MSG_CTRUNC != 0
    };
    if cut || count == 0 || into.len() - before != usize::from(count) {
        return Err(foreign());
    }
    Ok(())
}

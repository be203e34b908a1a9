# The guest: rewrites its pages one after another, checks what it had written, counts.
#
# Protected mode, flat, no paging, no interrupts. All of its state is in registers and in the page at STATE, so it may be
# stopped and moved at any instruction. guest.rs tells what the addresses and ports are.

        .pushsection .rodata.microvm_guest, "a", @progbits
        .globl  microvm_guest_start
        .globl  microvm_guest_end
        .code32

        .set    .Lcounter, 0x2000
        .set    .Lpage, 0x2004
        .set    .Lversion, 0x2008
        .set    .Lclock, 0x200c
        .set    .Lpages, 0x2010
        .set    .Lmailbox, 0x3000
        .set    .Lset, 0x100000
        .set    .Lstep, 0x9e3779b1

microvm_guest_start:
.Lbatch:
        movl    .Lpage, %ebx
        movl    $256, %ecx
.Lnext:
        movl    %ebx, %edi
        shll    $12, %edi
        addl    $.Lset, %edi
# What the last round wrote into three words of the page, and what this one writes.
        imull   $.Lstep, .Lversion, %eax
        addl    %ebx, %eax
        cmpl    %eax, (%edi)
        jne     .Lbad
        cmpl    %eax, 2048(%edi)
        jne     .Lbad
        cmpl    %eax, 4092(%edi)
        jne     .Lbad
        addl    $.Lstep, %eax
        movl    %eax, (%edi)
        movl    %eax, 2048(%edi)
        movl    %eax, 4092(%edi)
        incl    %ebx
        cmpl    .Lpages, %ebx
        jb      .Lsame
        xorl    %ebx, %ebx
        incl    .Lversion
.Lsame:
        decl    %ecx
        jnz     .Lnext
        movl    %ebx, .Lpage

# The clock never goes back, and the device has answered the last report.
        movl    $.Lclock, %edi
        movl    $0x12, %edx
        inl     %dx, %eax
        cmpl    .Lclock, %eax
        jb      .Lbad
        movl    %eax, .Lclock
        movl    $.Lmailbox, %edi
        movl    .Lmailbox, %eax
        cmpl    .Lcounter, %eax
        jne     .Lbad

        incl    %eax
        movl    %eax, .Lcounter
        movl    $0x10, %edx
        outl    %eax, %dx
        jmp     .Lbatch

# edi is where something is wrong.
.Lbad:
        movl    %edi, %eax
        movl    $0x11, %edx
        outl    %eax, %dx
        hlt
        jmp     .Lbad
microvm_guest_end:
        .code64
        .popsection

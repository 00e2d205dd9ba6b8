"""Every setting of the project, in frozen dataclasses by concern.

A field's text is written once, here, in English and Chinese; tooltips, `--help` and the
documentation are made from it. Names are the tutorial's own (`--micro_bsz`, `--lr_init`, …).
"""

import re
from dataclasses import dataclass

from .errors import SettingsError
from .fields import check, from_dict, leaf_fields, option, replace, to_json, values

__all__ = ["PRESETS", "STRATEGIES", "DataSettings", "LiveSettings", "LoraSettings", "Settings", "TrainSettings",
           "check", "check_together", "from_dict", "leaf_fields", "replace", "to_json", "values"]

STRATEGIES = ("auto", "ddp", *(f"deepspeed_stage_{stage}{how}" for stage in (1, 2, 3) for how in ("", "_offload")))


@dataclass(frozen=True)
class DataSettings:
    """What is learnt from."""

    data_file: str = option("", "training data, a file of any data_type; .jsonl, .bin and .idx may be left out",
                            "训练数据文件;后缀 .jsonl、.bin、.idx 可省略")
    data_type: str = option("auto", "format of data_file; auto looks at what is there; jsonl and binidx are usual",
                            "数据格式;auto 为自动识别;建议 jsonl 或 binidx", choices=(
                                 "auto", "jsonl", "binidx", "utf-8", "utf-16le", "numpy", "uint16", "sft", "dummy"))
    tokenizer: str = option("auto", "vocabulary; auto picks it from the model's number of rows",
                            "词表;auto 根据模型词表大小选择", choices=("auto", "world", "byte"))
    template: str = option("chat", "how documents are read: chat trains the assistant's turns, plain all of it",
                           "文档模板:chat 只训练助手回答,plain 训练全部文字",
                           choices=("chat", "plain", "g1", "g1_nothink", "instruction"))
    ctx_len: int = option(512, "longest piece of a document seen at once; as long as your documents are",
                          "上下文长度(token 数),按语料长度设置", unit="tokens", low=2)
    dataload: str = option("split", "split: long documents in pieces; pack: the same, in a row without padding; "
                           "pad: cut at ctx_len; only: one document a micro-batch; get: random slices (pre-training)",
                           "split 切分长文档;pack 紧密拼接不填充;pad 截断并填充;only 每批一篇;get 随机切片",
                           choices=("split", "pack", "pad", "only", "get"))
    loss_mask: str = option("template", "what is trained: as the template says; pad or none: everything; "
                            "qa: on from Assistant:, off from User:; se: the same with mask_id",
                            "训练范围:template 按模板;pad、none 全部;qa 从 Assistant: 到 User:;se 用 mask_id",
                            choices=("template", "pad", "none", "qa", "se"))
    mask_id: tuple[str, ...] = option((), "for se: the text from which training is off, and the one from which it is "
                                      "on", "用于 se:训练关闭与开启的标记文字")
    sft_field: tuple[str, ...] = option((), "for sft: the fields to read, the answer last, like query response; none "
                                        "named: those of jsonl", "用于 sft:读取的字段,最后一个是回答;"
                                        "留空则与 jsonl 相同")
    sft_split: str = option("train", "for sft: which rows, like train[:1000]", "用于 sft:使用哪些行,如 train[:1000]")
    heldout: float = option(0.0, "share of the documents that is kept out of training", "留出不参与训练的文档比例",
                            low=0, high=0.9)
    repeat: float = option(1.0, "times that data_file is read in an epoch", "每轮读取 data_file 的次数", low=0.01,
                           high=1000)
    mix_file: str = option("", "a second data file, such as general text against forgetting",
                           "第二个数据文件,例如防止遗忘的通用文本")
    mix_share: float = option(0.2, "share of the tokens that comes from mix_file", "来自 mix_file 的 token 比例",
                              low=0.01, high=0.99)
    data_seed: int = option(42, "seed of what is held out, repeated and mixed", "留出、重复、混合的随机种子", low=0)


@dataclass(frozen=True)
class LoraSettings:
    """The adapter that is trained beside the frozen base."""

    r: int = option(32, "rank of the adapter: 32 or 64 are usual; higher learns more and costs more",
                    "LoRA 秩,常用 32 或 64;越大效果越好,但越慢、越占显存", low=1)
    lora_alpha: float = option(64.0, "the adapter is scaled by lora_alpha / r; twice r is usual",
                               "缩放因子,实际缩放为 alpha / r,一般取 r 的两倍", low=0)
    peft: str = option("lora", "kind of adapter; LoRA is the one there is", "微调类型,目前为 lora", choices=("lora",))
    target_modules: tuple[str, ...] = option(
        (), "linear layers that get an adapter, by the end of their name, like att.key; none named: all but the head",
        "加 LoRA 的线性层(名称结尾),如 att.key;留空为除 head 外的全部")
    train_parts: tuple[str, ...] = option(
        (), "other parameters trained beside the adapter and saved with it: all whose name contains one of these, "
        "such as ln for the layer norms", "同时训练并随 LoRA 保存的其他参数(名称包含所给文字),如 ln 为全部 LayerNorm")


@dataclass(frozen=True)
class LiveSettings:
    """What may change while a run trains; read once per optimizer step."""

    lr_init: float = option(2e-4, "highest learning rate, reached after the warm-up",
                            "最高学习率,预热结束时达到", low=0)
    lr_final: float = option(2e-5, "learning rate at the last step; the tutorial advises lr_init's own value",
                             "最终学习率;教程建议与 lr_init 相同", low=0)
    grad_clip: float = option(1.0, "longest gradient, as an L2 norm over the adapter; 0 does not clip",
                              "梯度裁剪:LoRA 梯度 L2 范数的上限;0 为不裁剪", low=0)
    lr_end: int = option(0, "step at which the schedule reaches lr_final; 0 is the run's last",
                         "学习率到达 lr_final 的步数;0 为最后一步", unit="optimizer steps", low=0)
    accumulate_grad_batches: int = option(1, "micro-batches in one optimizer step, on each device",
                                          "梯度累积:每卡每个优化步的微批次数", low=1)
    lora_dropout: float = option(0.01, "share of the adapter's inputs dropped in training; 0.01 is usual",
                                 "LoRA 丢弃率,建议 0.01", low=0, high=0.99)
    log_every: int = option(1, "metrics are written once in this many steps", "每多少步记录一次",
                            unit="optimizer steps", low=1)
    save_every: int = option(0, "an adapter is also saved once in this many steps; 0 only at epochs",
                             "每多少步额外保存一次;0 为只在轮次结束时保存", unit="optimizer steps", low=0)
    eval_every: int = option(0, "the held-out loss is measured once in this many steps; 0 at the end of each epoch",
                             "每多少步在留出数据上评估一次;0 为每轮结束时", unit="optimizer steps", low=0)
    sample_every: int = option(0, "the prompts are also answered once in this many steps; 0 only at saves",
                               "每多少步回答一次示例问题;0 为只在保存时", unit="optimizer steps", low=0)


@dataclass(frozen=True)
class TrainSettings:
    """How it is learnt."""

    load_model: str = option("", "base model, a .pth file or Ai00's .st", "基底模型路径(.pth 或 Ai00 的 .st)")
    proj_dir: str = option("", "the run's folder: logs, adapters, merged models", "输出文件夹")
    my_testing: str = option("auto", "version of the model; auto reads it from load_model, else it is checked: "
                             "x070 is RWKV-7, x060 RWKV-6, x052 the deprecated RWKV-5",
                             "模型版本,auto 自动识别;v7 为 x070,v6 为 x060,v5 为 x052(已淘汰)",
                             choices=("auto", "x070", "x060", "x052"))
    n_layer: int = option(0, "layers; never needed, checked against load_model where given",
                          "层数,无需填写;填写时与模型核对", low=0)
    n_embd: int = option(0, "width; never needed, checked against load_model where given",
                         "宽度,无需填写;填写时与模型核对", low=0)
    vocab_size: int = option(0, "rows of the vocabulary; 0 takes load_model's, else it is checked against them",
                             "词表大小;0 为读取模型,填写时与模型核对", unit="tokens", low=0)
    micro_bsz: int = option(1, "documents worked on at once, on each device; raise it while memory lasts",
                            "微批次大小,从 1 开始逐渐增大", low=1, high=65_536)
    epoch_count: int = option(1, "epochs to train", "总训练轮次", low=1)
    epoch_steps: int = option(0, "optimizer steps in an epoch; 0 means once through the data",
                              "每轮的优化步数;0 表示完整遍历一遍数据", unit="optimizer steps", low=0)
    epoch_save: int = option(1, "an adapter is saved once in this many epochs; mind the disk where merge is 1",
                             "每多少轮保存一次;merge 为 1 时注意磁盘空间", low=1)
    live: LiveSettings = LiveSettings()
    warmup_steps: int = option(10, "steps in which the learning rate rises from near 0", "预热步数",
                               unit="optimizer steps", low=0)
    lr_schedule: str = option(
        "cos_decay", "after the warm-up: cos_decay falls along a cosine to lr_final; wsd stays at lr_init, then falls "
        "in a line to lr_final over the last decay_steps",
        "预热后的学习率:cos_decay 余弦下降;wsd 先保持不变,最后 decay_steps 步线性下降",
        choices=("cos_decay", "wsd"))
    decay_steps: int = option(0, "wsd: length of the fall at the end; 0 is a tenth of the steps",
                              "wsd 末尾下降的步数;0 为总步数的十分之一", unit="optimizer steps", low=0)
    weight_decay: float = option(0.0, "decoupled weight decay of the adapter", "权重衰减", low=0)
    beta1: float = option(0.9, "AdamW: memory of the gradient's mean", "AdamW beta1", low=0, high=0.9999)
    beta2: float = option(0.99, "AdamW: memory of the gradient's square", "AdamW beta2", low=0, high=0.99999)
    adam_eps: float = option(1e-8, "AdamW: added to the root of the square", "AdamW eps:加在分母上的小数", low=0)
    precision: str = option("fp32", "arithmetic of the base; the adapter itself is kept in fp32. bf16 is usual on "
                            "GPUs; fp16 scales the loss by itself; tf32 is fp32 with shorter products, GPUs only",
                            "基底的计算精度(LoRA 本身始终为 fp32),显卡上一般用 bf16;fp16 自动缩放损失;tf32 仅限显卡",
                            choices=("fp32", "tf32", "fp16", "bf16"))
    grad_cp: str = option(
        "none", "gradient checkpointing: block keeps only each block's input and computes the rest again in backward, "
        "selective keeps the results of WKV too; 0 and 1 mean none and block",
        "梯度检查点:block 最省显存但更慢,selective 另存 WKV 结果,none 最快;0 和 1 即 none 和 block",
        choices=("none", "selective", "block"))
    quant: str = option("none", "how the frozen linears of attention and FFN are held; int8 and nf4 need bitsandbytes",
                        "冻结线性层的存储精度;int8、nf4 需安装 bitsandbytes", choices=("none", "int8", "nf4"))
    quant_double: int = option(1, "nf4: 1 holds the scales of its blocks in 8 bits too", "nf4 双重量化",
                               choices=(0, 1))
    quant_head: int = option(0, "1 holds the head in int8", "1 表示输出层(head)用 int8 存储", choices=(0, 1))
    emb_cpu: int = option(0, "1 leaves the embedding in the CPU's memory", "1 表示词嵌入留在内存",
                          choices=(0, 1))
    adam_state: str = option("fp32", "AdamW's two averages: 8, 4 or 2 bytes a trained parameter; 8bit needs "
                             "bitsandbytes", "AdamW 状态精度;8bit 需安装 bitsandbytes",
                             choices=("fp32", "bf16", "8bit"))
    chunk_ctx: int = option(0, "tokens worked on at once, for a ctx_len beyond memory: the state is carried on and "
                            "the gradient is exact (infctx); 0 takes each document whole",
                            "超长上下文:每次处理的 token 数,状态连续传递、梯度精确;0 为不分块", unit="tokens", low=0)
    truncated_bptt: int = option(0, "with chunk_ctx: 1 lets no gradient cross from chunk to chunk (truncated "
                                 "backpropagation): faster, but nothing is learnt across a border",
                                 "配合 chunk_ctx:1 表示梯度不跨块传递(截断反向传播),更快但学不到跨块联系",
                                 choices=(0, 1))
    op: str = option(
        "auto", "WKV operator: auto takes the fastest that works here and says which; cuda, triton and fla are for "
        "GPUs, cpu is C++, chunked and torch are plain PyTorch",
        "WKV 算子:auto 选择可用的最快算子并说明;cuda、triton、fla 用于显卡,cpu 为 C++,chunked、torch 为纯 PyTorch",
        choices=("auto", "cuda", "triton", "fla", "cpu", "chunked", "torch"))
    accelerator: str = option("auto", "device that computes; auto takes the GPU where there is one",
                              "计算设备;auto 有显卡时用显卡", choices=("auto", "cpu", "gpu"))
    devices: int = option(1, "GPUs of each machine, or processes on a CPU", "每台机器的显卡数量(CPU 为进程数)", low=1)
    num_nodes: int = option(1, "machines; the same command runs on each, with its node_rank", "机器数量", low=1)
    node_rank: int = option(0, "number of this machine, from 0", "本机编号,从 0 开始", low=0)
    master_addr: str = option("", "with several machines: address and free port of machine 0, like 10.0.0.1:29500",
                              "多机训练时 0 号机器的地址与端口,如 10.0.0.1:29500")
    strategy: str = option(
        "auto", "how several devices share a run: ddp, which auto means, gives each the whole model; deepspeed_stage_1 "
        "shares out AdamW's averages, _2 the gradient too, _3 the base too, where it is larger than one GPU; _offload "
        "keeps what is shared out in the host's memory. One device needs none. DeepSpeed has run here on CPUs alone",
        "多卡训练策略:auto 即 ddp,每卡一份完整模型;deepspeed_stage_1 分摊 AdamW 状态,_2 再分摊梯度,_3 再分摊基底"
        "(单卡放不下时用);_offload 把分摊的部分放在内存。单卡不需要。DeepSpeed 目前只在 CPU 上验证过",
        choices=STRATEGIES)
    random_seed: int = option(42, "seed of the order, the initial adapter and dropout", "随机种子", low=0)
    merge: int = option(1, "1 writes rwkv-{epoch}.pth, the complete merged model, with each epoch's adapter",
                        "1 表示每次按轮次保存时,同时写出合并后的完整模型 rwkv-{epoch}.pth", choices=(0, 1))
    eval_file: str = option("", "held-out data, of data_file's kind, in place of a share of it (heldout): its loss "
                            "is measured while training, and the adapter with the lowest is kept as adapter-best",
                            "留出数据文件(代替 heldout):训练中评估,并保留损失最低的 LoRA")
    early_stop: int = option(0, "stop after this many evaluations without a lower held-out loss; 0 never",
                             "多少次评估没有改善就提前停止;0 为不停止", unit="evaluations", low=0)
    spike_factor: float = option(0.0, "a loss beyond this many times the median of the last 50 steps is a spike; 0 "
                                 "looks only for what is not a number",
                                 "损失超过最近 50 步中位数的多少倍视为突跳;0 为只检查 NaN", low=0)
    on_spike: str = option("stop", "at a spike or NaN: stop the run with its last checkpoint whole, or skip the step",
                           "出现突跳或 NaN 时:stop 停止并保留断点,skip 跳过该步", choices=("stop", "skip"))
    wandb: str = option("", "project name: metrics go to Weights & Biases too; without an account they wait in the "
                        "run's folder for `wandb sync`",
                        "wandb 项目名;无账号时离线记录在输出文件夹中,可用 wandb sync 上传")
    checkpoint_seconds: float = option(60.0, "a checkpoint to resume from is written this often",
                                       "保存断点的间隔(秒)", unit="seconds", low=0)

    def __post_init__(self):
        words = {"0": "none", "1": "block"}    # RWKV-PEFT's for grad_cp
        object.__setattr__(self, "grad_cp", words.get(str(self.grad_cp), self.grad_cp))


# What each preset sets; quant is chosen beside it. small: the least memory of a GPU, at the cost of speed.
PRESETS = {
    "fast": {"grad_cp": "none", "emb_cpu": 0, "quant_head": 0, "adam_state": "fp32"},
    "balanced": {"grad_cp": "block", "emb_cpu": 1, "quant_head": 0, "adam_state": "fp32"},
    "small": {"grad_cp": "block", "emb_cpu": 1, "quant_head": 1, "adam_state": "8bit", "quant_double": 1},
}


@dataclass(frozen=True)
class Settings:
    """All of a run."""

    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()


def check_together(settings: Settings) -> None:
    """Raise SettingsError where a setting is wrong by itself, as check() does, or two contradict each other."""
    check(settings)
    t = settings.train
    zero = t.devices * t.num_nodes > 1 and t.strategy.startswith("deepspeed")
    parted = zero and t.strategy.startswith("deepspeed_stage_3")

    def refuse(wrong, name: str, what: str, fix: str) -> None:
        if wrong:
            raise SettingsError(what, where=name, fix=fix)

    refuse(t.decay_steps and t.lr_schedule != "wsd", "decay_steps", "decay_steps belongs to lr_schedule wsd",
           "set lr_schedule to wsd, or decay_steps to 0")
    refuse(t.truncated_bptt and not t.chunk_ctx, "truncated_bptt", "truncated_bptt belongs to chunk_ctx",
           "set chunk_ctx, for instance to 1024")
    refuse(t.chunk_ctx and settings.data.dataload == "pack", "chunk_ctx", "packed documents are not cut into chunks",
           "set dataload to split, or chunk_ctx to 0")
    refuse(t.live.lr_end and t.live.lr_end <= t.warmup_steps, "lr_end", "the schedule ends before the warm-up does",
           "raise lr_end or lower warmup_steps")
    refuse(t.node_rank >= t.num_nodes, "node_rank", f"node_rank {t.node_rank} of {t.num_nodes} machines",
           "machines count from 0")
    refuse(t.num_nodes > 1 and not re.fullmatch(r".+:\d+", t.master_addr), "master_addr",
           f"several machines need an address to meet at, which {t.master_addr!r} is not",
           "give machine 0's address and a free port, like 10.0.0.1:29500")
    refuse(zero and t.adam_state != "fp32", "adam_state",
           f"DeepSpeed keeps AdamW's averages in fp32, not {t.adam_state}",
           "set adam_state to fp32, or strategy to ddp")
    refuse(parted and (t.quant != "none" or t.quant_head), "quant",
           "stage 3 shares out plain weights, not quantised ones", "use deepspeed_stage_2 or ddp, or leave quant out")
    refuse(parted and t.emb_cpu, "emb_cpu", "stage 3 holds the embedding with the rest",
           "leave emb_cpu out; deepspeed_stage_3_offload keeps all weights in the host's memory")
    refuse(parted and t.chunk_ctx, "chunk_ctx",
           "under stage 3 all processes compute in step, chunks differ between them", "use deepspeed_stage_2 or ddp")
    refuse(parted and settings.lora.train_parts, "train_parts", "stage 3 trains adapters alone",
           "use deepspeed_stage_2 or ddp")
